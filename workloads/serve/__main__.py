"""Starts the model server: binds at once, loads the model in a thread, and keeps its status file true."""

import argparse
import asyncio
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from workloads import cores
from workloads.serve.app import Server
from workloads.specs import ServerStatus


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workloads.serve", description="Serve one language model over HTTP."
    )
    parser.add_argument("--served-model-name", required=True, help="the name clients ask for")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, help="a folder that transformers loads by itself")
    source.add_argument("--base-model", help="a name of the catalogue; installed on first use")
    parser.add_argument("--models-root", type=Path, help="root of the catalogue, with --base-model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the status file says which")
    parser.add_argument("--status-file", type=Path, help="where to write the server's state")
    parser.add_argument("--finish-s", type=int, default=10, help="how long answers may go on after SIGTERM, in seconds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the computation")
    return parser.parse_args()


class Status:
    """The status file, replaced whole."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def write(self, status: ServerStatus) -> None:
        if self._file is None:
            return
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        temporary.write_text(status.model_dump_json())
        temporary.replace(self._file)


def load(server: Server, options: argparse.Namespace) -> None:
    """Load the model and attach the engine. Raises whatever stands in the way."""
    cores.prepare(options.threads)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workloads.base_models.install import ensure
    from workloads.serve.engine import Engine

    folder = options.weights
    if folder is None:
        folder = ensure(options.base_model, options.models_root, lambda message: print(message, flush=True))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    torch.set_num_threads(cores.useful_threads(model.num_parameters(), options.threads))
    server.engine = Engine(model.eval(), tokenizer)


def explain(error: BaseException) -> str:
    """What happened and what to do, for the status file."""
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in text.lower():
        return f"out of memory while the model was loaded: {text}. Serve a smaller model, or free some memory."
    if isinstance(error, FileNotFoundError):
        return f"{text}. Check the weights' path, or fine-tune again."
    return f"the model could not be loaded: {text}"


async def serve(options: argparse.Namespace) -> int:
    listener = socket.create_server((options.host, options.port), reuse_port=False)
    port = listener.getsockname()[1]
    status = Status(options.status_file)
    status.write(ServerStatus(state="starting", pid=os.getpid(), port=port))
    front = Server(options.served_model_name)
    config = uvicorn.Config(
        front.app, log_level="warning", access_log=False, timeout_graceful_shutdown=options.finish_s
    )
    http = uvicorn.Server(config)
    failure: list[BaseException] = []

    def loading() -> None:
        try:
            load(front, options)
            status.write(ServerStatus(state="ready", pid=os.getpid(), port=port))
        except BaseException as error:
            failure.append(error)
            http.should_exit = True

    # uvicorn stops on these, and raises them again when it is done: that should not count as being killed.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)
    threading.Thread(target=loading, name="load", daemon=True).start()
    await http.serve(sockets=[listener])
    if failure:
        message = explain(failure[0])
        status.write(ServerStatus(state="failed", pid=os.getpid(), error=message))
        print(message, file=sys.stderr, flush=True)
        return 1
    return 0


def main() -> None:
    # The engine's thread may be deep in a computation: leave without waiting for it.
    code = asyncio.run(serve(arguments()))
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
