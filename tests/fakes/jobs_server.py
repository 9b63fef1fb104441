"""`python -m tests.fakes.jobs_server PORT [--instead MODULE]`: the part of Ray's Jobs HTTP API that `mini_studio.drivers.ray` uses.

Each entrypoint runs as a real process, where Ray's own rate is the limit of a test. As Ray does, it forgets every job when it is
killed, while their processes survive it as orphans. It is the cluster, so it decides what it runs: with `--instead`, that module in
place of `workloads.train`.
"""

import argparse
import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

from tests.fakes.broker import lasting_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
CPUS, MEMORY = 2.0, 4.0e9
TRAINER = "-m workloads.train "
STOP_S = 3.0
"""From SIGTERM to SIGKILL, as in Ray."""
Answer = tuple[int, Any]


@dataclass
class Submitted:
    """One job and its process."""

    metadata: dict[str, str]
    process: subprocess.Popen[bytes]
    log: Path
    stopped: bool = False

    def report(self) -> dict[str, Any]:
        code = self.process.poll()
        if code is None:
            return {"status": "RUNNING", "message": "", "metadata": self.metadata}
        status = "STOPPED" if self.stopped else "FAILED" if code else "SUCCEEDED"
        said = {"status": status, "message": f"ended with {code}", "metadata": self.metadata}
        return said if self.stopped else {**said, "driver_exit_code": code}

    def stop(self) -> None:
        if self.process.poll() is None:
            self.stopped = True
            self.process.terminate()
            threading.Timer(STOP_S, self.process.kill).start()


class Jobs:
    """The job table: in memory alone."""

    def __init__(self, logs: Path, instead: str | None) -> None:
        self._logs, self._instead = logs, instead
        self._lock = threading.Lock()
        self._jobs: dict[str, Submitted] = {}

    def submit(self, body: dict[str, Any]) -> Answer:
        id = body["submission_id"]
        with self._lock:
            if id in self._jobs:
                return 500, f"Traceback ...\nValueError: Job with submission_id {id} already exists."
            self._jobs[id] = self._start(id, body)
        return 200, {"submission_id": id}

    def _start(self, id: str, body: dict[str, Any]) -> Submitted:
        entrypoint = body["entrypoint"]
        if self._instead:
            entrypoint = entrypoint.replace(TRAINER, f"-m {self._instead} ", 1)
        log = self._logs / id
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S602 - a shell runs it, as in Ray
                entrypoint,
                shell=True,
                env={**os.environ, **body["runtime_env"]["env_vars"]},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Submitted(body["metadata"], process, log)

    def of(self, id: str, verb: str) -> Answer:
        job = self._jobs.get(id)
        if job is None:
            return 404, f"Job {id} does not exist"
        if verb == "logs":
            return 200, {"logs": job.log.read_text()}
        if verb == "stop":
            job.stop()
            return 200, {"stopped": True}
        return 200, job.report()


NODES = {"state": "ALIVE", "resources_total": {"CPU": CPUS, "memory": MEMORY}}


class Handler(http.server.BaseHTTPRequestHandler):
    """Routes requests to the table."""

    jobs: ClassVar[Jobs]

    def do_GET(self) -> None:
        if self.path == "/api/v0/nodes":
            self._answer(200, {"data": {"result": {"result": [NODES]}}})
        elif self.path == "/api/cluster_status":
            self._answer(200, {"data": {"clusterStatus": None}})
        else:
            self._of_job()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/api/jobs/":
            self._answer(*self.jobs.submit(json.loads(body)))
        else:
            self._of_job()

    def _of_job(self) -> None:
        found = re.fullmatch(r"/api/jobs/([^/]+)(?:/(logs|stop))?", self.path)
        self._answer(*self.jobs.of(unquote(found[1]), found[2] or "") if found else (404, "Not Found"))

    def _answer(self, code: int, content: Any) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        return


@dataclass
class JobsServer:
    """One as a process that can be killed and started again."""

    port: int = field(default_factory=lasting_port)
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.fakes.jobs_server", str(self.port), *self.options]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **self.environment})
        wait_for(self.port)

    def pids(self) -> list[int]:
        return [self.process.pid] if self.process is not None and self.process.poll() is None else []

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        """After it was killed, by this or by somebody else."""
        self.kill()
        self.start()


@contextlib.contextmanager
def running_jobs_server() -> Iterator[str]:
    """Its address; it is ended with the context."""
    server = JobsServer()
    server.start()
    yield server.address
    assert server.process is not None
    server.process.terminate()
    server.process.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--instead")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory(prefix="jobs-server-") as logs:
        Handler.jobs = Jobs(Path(logs), options.instead)
        http.server.ThreadingHTTPServer.request_queue_size = 128
        with http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler) as server:
            server.serve_forever()


if __name__ == "__main__":
    main()
