"""How long a model server may take: 504 before the first byte of its answer, a broken connection after it, with either client."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.gateway.conftest import Client, Served, post, serving, settings_for, started
from tests.gateway.recording import CHUNKED, Recorder, chunk, silent
from tests.gateway.wire import Wire

FIRST_S, BETWEEN_S, TOTAL_S, CONNECT_S = 0.8, 0.5, 2.0, 0.5
UNREACHABLE = "http://192.0.2.1:9"
"""TEST-NET-1 (RFC 5737): where nobody answers, or what the machine says at once."""


@pytest.fixture(scope="module")
def gateway(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {"connect_s": CONNECT_S, "first_byte_s": FIRST_S, "between_bytes_s": BETWEEN_S, "total_s": TOTAL_S}
    with serving(settings_for(client, tmp_path_factory.mktemp("gateway"), **limits)) as served:
        yield served


async def test_no_first_byte(caller: Wire, model: Recorder) -> None:
    model.behave = silent
    began = time.monotonic()
    await caller.send(post())
    answer = await caller.answer()
    assert answer.status == 504
    assert time.monotonic() - began >= FIRST_S * 0.9
    await model.left()
    assert len(model.requests) == 1, "it was sent: nobody tries again"
    model.behave = model.echo
    await caller.send(post())
    assert (await caller.answer()).status == 200, "the client's connection is as good as ever"


async def test_a_head_without_end_is_no_answer(caller: Wire, model: Recorder) -> None:
    async def half_a_head(wire: Wire) -> None:
        await wire.message()
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-")
        await silent(wire)

    model.behave = half_a_head
    await caller.send(post())
    assert (await caller.answer()).status == 504
    await model.left()


async def test_silence_within_an_answer(caller: Wire, model: Recorder) -> None:
    async def falls_silent(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED + chunk(b"xx"))
        await silent(wire)

    model.behave = falls_silent
    await caller.send(post())
    assert await asyncio.wait_for(caller.message(b"POST"), 10) is None, "a whole answer"
    assert caller.received.endswith(chunk(b"xx"))
    await model.left()


@pytest.mark.parametrize("pause_s", [BETWEEN_S / 5])
async def test_an_answer_that_never_ends_is_broken_off(caller: Wire, model: Recorder, pause_s: float) -> None:
    async def drips(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED)
        while await wire.send(chunk(b"x")):
            await asyncio.sleep(pause_s)
        wire.ended = True

    model.behave = drips
    began = time.monotonic()
    await caller.send(post())
    assert await asyncio.wait_for(caller.message(b"POST"), 10) is None, "a whole answer"
    assert time.monotonic() - began >= TOTAL_S * 0.9
    await model.left()


async def test_a_slow_answer_within_the_limits_is_whole(caller: Wire, model: Recorder) -> None:
    async def slow(wire: Wire) -> None:
        while await wire.message():
            await wire.send(CHUNKED)
            for _ in range(8):
                await asyncio.sleep(BETWEEN_S / 4)
                await wire.send(chunk(b"x"))
            await wire.send(b"0\r\n\r\n")

    model.behave = slow
    await caller.send(post())
    assert (await caller.answer()).body == b"x" * 8


async def test_a_connection_that_is_not_made(gateway: Served, caller: Wire, model: Recorder) -> None:
    gateway.route_urls(UNREACHABLE, model="away")
    await caller.send(post(path=b"/inference/infer/away"))
    assert (await caller.answer(patience_s=30)).status in (502, 504)


async def test_a_slow_upload_is_not_a_slow_model(caller: Wire, model: Recorder) -> None:
    """The time to the first byte counts from the end of the request."""
    await caller.send(started(b"Content-Length: 6"))
    for _ in range(6):
        await asyncio.sleep(FIRST_S / 4)
        await caller.send(b"x")
    assert (await caller.answer()).status == 200
