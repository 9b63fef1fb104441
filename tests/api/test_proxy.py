"""The inference proxy between a client's socket and a model server's."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from events.types import DeploymentKind, DeploymentStatus
from mini_studio.records.routes import Route
from tests.fakes.upstream import Upstream, until, upstream

INFER = "/inference/infer/m"


@pytest.fixture
async def model(app: FastAPI, url: str) -> AsyncIterator[Upstream]:
    """The model server behind the shared route `m`."""
    async with upstream() as model:
        route = Route(
            deployment_id="dep_1", name="m", client_code="", kind=DeploymentKind.BASE, model="m", base_model="m",
            status=DeploymentStatus.READY, endpoints=[model.url], requested_at="", revision=1,
        )  # fmt: skip
        app.state.routes.put("dep_1", route)
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
    await until(lambda: model.bodies == [b"{}"])
    writer.close()
    await until(lambda: model.left == 1)


async def test_a_client_that_hangs_up_within_an_answer_stops_the_generation(url: str, model: Upstream) -> None:
    model.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"
    reader, writer = await connect(url)
    await reader.readuntil(b"{}")
    writer.close()
    await until(lambda: model.left == 1)


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
        return "request.done" in logged

    await until(done)
    assert "status=400" in logged or '"status": 400' in logged, logged
    assert "Traceback" not in logged
