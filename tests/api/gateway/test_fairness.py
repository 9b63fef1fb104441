"""One client's flood does not stand in another one's way. How little it is felt is for `benchmarks/fairness.py`."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from tests.fakes.gateways import routed_gateway, shared_route
from tests.fakes.waiting import until

MODEL = "tiny-llama"
FLOOD = 500
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class Patient:
    """A model server that leaves those waiting whose prompt is `slow`."""

    waiting: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
                if b"slow" in await reader.readexactly(length):
                    self.waiting += 1
                    await reader.read()
                    self.waiting -= 1
                    break
                writer.write(ANSWER)
        writer.close()


@pytest.fixture
async def model() -> AsyncIterator[Patient]:
    patient = Patient()
    async with await asyncio.start_server(patient.serve, "127.0.0.1", 0, backlog=FLOOD) as server:
        patient.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield patient


async def flood(port: int, client: str) -> list[asyncio.StreamWriter]:
    """So many requests, each on a connection of its own."""
    writers = []
    for _ in range(FLOOD):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /inference/infer/{MODEL} HTTP/1.1\r\nHost: x\r\nX-User-ID: {client}\r\nContent-Length: 18\r\n\r\n"
        writer.write(head.encode() + b'{"prompt": "slow"}')
        writers.append(writer)
    return writers


@pytest.mark.parametrize("client", ["fast", "plain"])
async def test_another_client_is_answered_while_a_flood_waits(model: Patient, client: str) -> None:
    async with routed_gateway(shared_route(MODEL, model.url), GATEWAY__CLIENT=client) as url:
        writers = await flood(httpx.URL(url).port or 0, "flood")
        await until(lambda: model.waiting == FLOOD, 60)
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as other:
            for _ in range(3):
                answer = await other.post(
                    f"/inference/infer/{MODEL}", content=b'{"prompt": "quick"}', headers={"X-User-ID": "other"}
                )
                assert (answer.status_code, model.waiting) == (200, FLOOD)
        for writer in writers:
            writer.close()
        await until(lambda: model.waiting == 0, 60)
