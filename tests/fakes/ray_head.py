"""A real Ray head on ports and in folders of its own, for tests; ended by its own processes, never by `ray stop`."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]
PORTS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--node-manager-port",
    "--object-manager-port",
    "--ray-client-server-port",
)


MOST_STARTS = 3
TRAINING = "workloads.train"


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def stub_trainer() -> dict[str, Any]:
    """Arguments of `RayCluster` that run `tests.fakes.trainer` in place of the real one."""
    return {"module": "tests.fakes.trainer", "pythonpath": str(ROOT)}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running_head(token: str | None = None) -> "Iterator[RayHead]":
    """A head with a node; it is ended with the context."""
    head = RayHead(token)
    try:
        head.wait()
        yield head
    finally:
        head.close()


class RayHead:
    """With a token, nobody may use it without one."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        # a token file that a local `ray.init()` left behind would turn authentication on
        self._auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.address = f"http://127.0.0.1:{ports['--dashboard-port']}"
        # short: Ray puts Unix sockets there, whose paths may have 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="msray"))
        options = [part for option, port in ports.items() for part in (option, str(port))]
        self._command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--temp-dir", str(self.folder)),
            *("--min-worker-port", "0", "--max-worker-port", "0"),
            *("--num-cpus", "2", "--object-store-memory", "80000000", *options),
        ]
        self._log = (self.folder / "start.log").open("a")
        self.start()

    def start(self) -> None:
        """Also again, at the same address, after it was killed: it comes back empty."""
        self.process = subprocess.Popen(
            self._command,
            # without it Ray takes the loopback address for a mistake, and listens to the whole network
            env={**os.environ, **self._auth, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until it has a node: the dashboard answers before there is one, and a submission would wait.

        A Ray that gives up while it starts, as it does on a busy machine, is started again, as the launcher does.
        """
        starts = 1
        for _ in range(1200):
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.get(f"{self.address}/api/v0/nodes", timeout=2, trust_env=False, headers=self._headers)
                if '"ALIVE"' in answer.text:
                    return
            if self.process.poll() is not None:
                if starts == MOST_STARTS:
                    break
                starts += 1
                self.start()
            time.sleep(0.1)
        raise AssertionError((self.folder / "start.log").read_text())

    def processes(self) -> list[psutil.Process]:
        """The head's own process and everything below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def named(self, *words: str) -> list[psutil.Process]:
        """Those whose command line has one of the words."""
        return [process for process in self.processes() if any(word in command_line(process) for word in words)]

    def kill(self) -> None:
        """All of Ray at once, and nothing of what it runs."""
        killed = [process for process in self.processes() if TRAINING not in command_line(process)]
        for process in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(killed, timeout=10)

    def close(self) -> None:
        ours = self.processes()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        _, alive = psutil.wait_procs(ours, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
