"""The API as its own process, started as the launcher starts it."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes.broker import free_port, wait_for


@pytest.fixture
def port(api: tuple[int, subprocess.Popen[bytes]]) -> int:
    return api[0]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    addresses = {"MINI_STUDIO_API__PORT": str(port), "MINI_STUDIO_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}"}
    command = [sys.executable, "-m", "mini_studio.cli", "api", "--data", str(tmp_path)]
    process = subprocess.Popen(command, env={**os.environ, **addresses}, stdout=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("piece", [b"X: %s\r\n" % (b"x" * 65_000), b"x" * 65_000], ids=["many", "one"])
def test_an_endless_head_is_refused(port: int, piece: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(piece)


def test_heads_of_one_connection_are_counted_apart(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for _ in range(30):
            assert client.get("/health", headers={"X": "x" * 10_000}).status_code in (200, 503)


def test_what_is_no_http_is_refused_in_our_shape(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"no http at all\r\n\r\n")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["ok"] is False


def test_a_request_on_an_idle_connection_is_answered_while_the_server_ends(
    api: tuple[int, subprocess.Popen[bytes]],
) -> None:
    port, process = api
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert client.get("/").status_code == 200
        process.terminate()
        time.sleep(1)
        answer = client.get("/")
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    process.wait(20)


def test_callers_wait_on_a_socket_that_outlives_the_process(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), 60) as early,
    ):
        early.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        environment = {**os.environ, "MINI_STUDIO_API__LISTENER": str(listener.fileno())}
        environment["MINI_STUDIO_KAFKA__BOOTSTRAP"] = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "mini_studio.cli", "api", "--data", str(tmp_path)]
        process = subprocess.Popen(command, env=environment, pass_fds=[listener.fileno()], stdout=subprocess.DEVNULL)
        assert early.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
        process.terminate()
        process.wait(20)
        with socket.create_connection(listener.getsockname(), 5):
            pass
