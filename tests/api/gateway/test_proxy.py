"""The inference proxy between a client's socket and a model server's."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from events.types import DeploymentKind, DeploymentStatus
from mini_studio.records.routes import Route
from tests.fakes.upstream import Upstream, upstream
from tests.fakes.waiting import until

INFER = "/inference/infer/m"


@pytest.fixture
async def model(app: FastAPI, url: str) -> AsyncIterator[Upstream]:
    """The model server behind the shared route `m`."""
    async with upstream() as model:
        route = Route(
            deployment_id="dep_1", name="m", client_code="", kind=DeploymentKind.BASE, model="m", base_model="m",
            status=DeploymentStatus.READY, endpoints=[model.url], requested_at="", revision=1,
        )  # fmt: skip
        app.state.routes.put("dep_1", route, 1)
        yield model


async def connect(
    url: str, *headers: bytes, body: bytes = b"{}", path: str = INFER
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client on a bare socket, its request sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    sent = headers or (b"Content-Length: %d" % len(body),)
    writer.write(b"\r\n".join([b"POST %s HTTP/1.1" % path.encode(), b"Host: x", *sent, b"", body]))
    await writer.drain()
    return reader, writer


async def test_a_client_that_hangs_up_before_the_answer_stops_the_generation(url: str, model: Upstream) -> None:
    model.answer = None
    _, writer = await connect(url)
    await until(lambda: model.bodies == [b"{}"], 5)
    writer.close()
    await until(lambda: model.left == 1, 5)


async def test_a_client_that_hangs_up_within_an_answer_stops_the_generation(url: str, model: Upstream) -> None:
    model.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"
    reader, writer = await connect(url)
    await reader.readuntil(b"{}")
    writer.close()
    await until(lambda: model.left == 1, 5)


@pytest.mark.parametrize("path", [INFER, "/fine_tuning/submit-finetune"])
async def test_a_client_that_hangs_up_within_its_body_is_no_failure(
    url: str, model: Upstream, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, writer = await connect(url, b"Content-Length: 9", path=path)
    await asyncio.sleep(0.1)
    writer.close()
    logged = ""

    def done() -> bool:
        nonlocal logged
        logged += "".join(capsys.readouterr())
        return "request.done" in logged or "exchange.failed" in logged

    await until(done, 5)
    assert "status=400" in logged or "status=499" in logged
    assert "Traceback" not in logged


async def ask(url: str, *headers: bytes) -> list[bytes]:
    """The head's lines of the answer."""
    reader, writer = await connect(url, b"Content-Length: 2", *headers)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    return head.lower().split(b"\r\n")


async def test_any_bytes_in_a_header_reach_the_model(url: str, model: Upstream) -> None:
    for value in ("é".encode(), b"\xe9"):
        assert (await ask(url, b"Accept: " + value))[0] == b"http/1.1 200 ok"
        assert b"\r\naccept: " + value + b"\r\n" in model.heads.pop()


async def test_only_a_caller_that_asks_for_it_gets_a_compressed_answer(url: str, model: Upstream) -> None:
    await ask(url)
    assert b"\r\naccept-encoding: identity\r\n" in model.heads.pop()
    await ask(url, b"Accept-Encoding: br")
    assert b"\r\naccept-encoding: br\r\n" in model.heads.pop()


async def test_every_header_of_the_answer_is_passed_on_but_those_of_the_connection(url: str, model: Upstream) -> None:
    head = (b"Set-Cookie: a=1", b"Set-Cookie: b=2", b"X-Own: \xe9", b"Connection: keep-alive, X-Hop", b"X-Hop: 1")
    model.answer = b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: 2", *head, b"", b"{}"])
    lines = await ask(url)
    assert {b"set-cookie: a=1", b"set-cookie: b=2", b"x-own: \xe9", b"content-length: 2"} <= set(lines)
    assert not [line for line in lines if b"hop" in line]


async def test_a_cookie_of_a_model_is_not_sent_with_the_next_request(url: str, model: Upstream) -> None:
    model.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: session=acme\r\n\r\n{}"
    await ask(url)
    await ask(url)
    assert b"cookie" not in model.heads[1]


@pytest.mark.parametrize("asked_by", ["fast"])
async def test_a_connection_is_dropped_before_the_model_server_drops_it(url: str, model: Upstream) -> None:
    await ask(url)
    await ask(url)
    assert model.connections == 1
    await asyncio.sleep(2.5)
    await ask(url)
    assert model.connections == 2
