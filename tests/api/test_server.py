"""The API as its own process, started as the launcher starts it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import free_port, wait_for


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    port = free_port()
    addresses = {"MINI_STUDIO_API__PORT": str(port), "MINI_STUDIO_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "mini_studio.cli", "api", "--data", str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, **addresses}, stdout=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        process.kill()
        process.wait()


def test_endless_headers_are_refused(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(ConnectionError):
            for n in range(1000):
                client.sendall(b"X-%d: %s\r\n" % (n, b"x" * 65_000))
