"""Streams through the gateway: no chunk waits for the next one, and who is slow slows the other side, not the process."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.gateway.conftest import Client, Served, post, started
from tests.gateway.recording import CHUNKED, LAST_CHUNK, Recorder, chunk, framed, once, recorder
from tests.gateway.wire import PIECE, Wire, connected

MIB = 1024 * 1024
STREAMS = 200
CHUNKS = 5
LARGE = 10 * MIB
STREAMED = 1024 * MIB
GROWTH = 48 * MIB
"""What the process may grow by while that passes: some buffers, whatever its length."""
HELD_BACK = 24 * MIB
"""What may be between two ends of which one does not read: the buffers of four sockets, and some of the gateway's own."""
MUCH = 96 * MIB


def event(number: int) -> bytes:
    return b'data: {"n": %d}\n\n' % number


@pytest.mark.parametrize("framing", ["chunks", "length", "end"])
async def test_each_chunk_arrives_before_the_next_is_sent(caller: Wire, model: Recorder, framing: str) -> None:
    go = asyncio.Queue[None]()
    size = sum(len(event(number)) for number in range(CHUNKS))
    heads = {"chunks": CHUNKED, "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size,
             "end": b"HTTP/1.1 200 OK\r\n\r\n"}  # fmt: skip

    async def step(wire: Wire) -> None:
        await wire.message()
        await wire.send(heads[framing])
        for number in range(CHUNKS):
            await go.get()
            await wire.send(chunk(event(number)) if framing == "chunks" else event(number))
        await wire.send(LAST_CHUNK if framing == "chunks" else b"")

    model.behave = step
    await caller.send(post())
    await caller.until(b"\r\n\r\n")  # the head does not wait for the first chunk
    for number in range(CHUNKS):
        go.put_nowait(None)
        await caller.until(event(number))
    caller.at = 0
    assert (await caller.answer()).body == b"".join(map(event, range(CHUNKS)))


async def test_the_pieces_of_a_request_go_up_one_by_one(caller: Wire, model: Recorder) -> None:
    await caller.send(started(b"Transfer-Encoding: chunked", body=chunk(b"piece 0")))
    wire = await model.asked()
    for number in range(1, CHUNKS):
        async with asyncio.timeout(10):
            while b"piece %d" % (number - 1) not in wire.received:
                await asyncio.sleep(0.005)
        await caller.send(chunk(b"piece %d" % number))
    await caller.send(LAST_CHUNK)
    assert (await caller.answer()).status == 200


async def test_many_streams_in_lock_step(gateway: Served, model: Recorder) -> None:
    """Chunk n of every stream has arrived before chunk n + 1 of any is sent."""
    steps = [asyncio.Event() for _ in range(CHUNKS)]

    async def step(wire: Wire) -> None:
        request = await wire.message()
        assert request is not None
        await wire.send(CHUNKED)
        for number in range(CHUNKS):
            await steps[number].wait()
            await wire.send(chunk(request.body + event(number)))
        await wire.send(LAST_CHUNK)

    model.behave = step
    callers = await asyncio.gather(*(gateway.connect() for _ in range(STREAMS)))
    await asyncio.gather(*(caller.send(post(b"<%d>" % number)) for number, caller in enumerate(callers)))
    for number in range(CHUNKS):
        steps[number].set()
        await asyncio.gather(*(caller.until(b"<%d>" % who + event(number), 30) for who, caller in enumerate(callers)))
    for who, caller in enumerate(callers):
        caller.at = 0
        expected = b"".join(b"<%d>" % who + event(number) for number in range(CHUNKS))
        assert (await caller.answer()).body == expected
        caller.close()


async def test_a_large_body_up_and_down(caller: Wire, model: Recorder) -> None:
    body = json.dumps({"prompt": "é" * (LARGE // 6)}).encode()
    assert len(body) > LARGE * 0.9

    async def mirror(wire: Wire) -> None:
        while request := await wire.message():
            await wire.send(framed(request.body, b"Content-Type: application/json"))

    model.behave = mirror
    sending = asyncio.create_task(caller.send(post(body)))
    answer = await caller.answer(patience_s=30)
    assert await sending
    assert (answer.status, answer.body == body) == (200, True)
    assert model.requests[0].body == body


class Measured:
    """A gateway whose memory is its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.port = port
        self._memory = psutil.Process(process.pid)

    @property
    def rss(self) -> int:
        return int(self._memory.memory_info().rss)


@pytest.fixture
async def slow_model() -> AsyncIterator[Recorder]:
    async with recorder(receive_buffer=64 * 1024) as server:
        yield server


@pytest.fixture
async def measured(client: Client, slow_model: Recorder, tmp_path: Path) -> AsyncIterator[Measured]:
    command = [sys.executable, "-m", "tests.gateway.measured", client, slow_model.url, str(tmp_path)]
    process = await asyncio.to_thread(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdin is not None
        port = int(await asyncio.to_thread(process.stdout.readline))
        slow_model.behave = once(framed(b"{}", b"Connection: close"))
        warm = await connected(port)
        await warm.send(post())
        assert (await warm.answer()).status == 200
        warm.close()
        yield Measured(process, port)
    finally:
        process.kill()
        process.communicate()


async def test_a_long_stream_takes_no_memory(measured: Measured, slow_model: Recorder) -> None:
    piece = chunk(b"x" * PIECE)

    async def much(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED)
        for _ in range(STREAMED // PIECE):
            await wire.send(piece)
        await wire.send(LAST_CHUNK)

    slow_model.behave = much
    caller = await connected(measured.port)
    before, most, got, last = measured.rss, 0, 0, b""
    await caller.send(post(b"{}", b"Connection: close"))
    while await asyncio.wait_for(caller.receive(), 10):
        got += len(caller.received)
        last = bytes((last + caller.received)[-len(LAST_CHUNK) :])
        caller.received.clear()
        most = max(most, measured.rss)
    caller.close()
    assert STREAMED <= got <= STREAMED * 1.01
    assert last == LAST_CHUNK
    assert most - before < GROWTH


async def stalls(sender: Wire) -> int:
    """How many bytes it got rid of when no more are taken."""
    seen = -1
    async with asyncio.timeout(30):
        while sender.sent != seen:
            seen = sender.sent
            await asyncio.sleep(0.5)
    return seen


async def test_a_slow_reader_slows_the_model(measured: Measured, slow_model: Recorder) -> None:
    async def much(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED + chunk(b"x" * MUCH) + LAST_CHUNK)

    slow_model.behave = much
    before = measured.rss
    caller = await connected(measured.port, receive_buffer=64 * 1024)
    await caller.send(post())
    wire = await slow_model.asked(2)
    async with asyncio.timeout(10):
        while not wire.sent:
            await asyncio.sleep(0.01)
    assert await stalls(wire) < HELD_BACK
    assert measured.rss - before < GROWTH
    other = await connected(measured.port)
    await other.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await other.answer(b"GET")).status == 200, "nobody else waits for it"
    other.close()
    size = 0
    while bytes(caller.received[-len(LAST_CHUNK) :]) != LAST_CHUNK:
        assert await asyncio.wait_for(caller.receive(), 10), "broken off"
        size += len(caller.received) - len(LAST_CHUNK)
        del caller.received[: -len(LAST_CHUNK)]
    assert MUCH <= size + len(LAST_CHUNK) <= MUCH * 1.01
    caller.close()


async def test_a_slow_model_slows_the_upload(measured: Measured, slow_model: Recorder) -> None:
    go_on = asyncio.Event()

    async def waits(wire: Wire) -> None:
        await go_on.wait()
        while request := await wire.message():
            await wire.send(framed(b"%d" % len(request.body)))

    slow_model.behave = waits
    before, size = measured.rss, 15 * MIB
    callers = [await connected(measured.port) for _ in range(8)]
    sending = [asyncio.create_task(caller.send(post(b"x" * size))) for caller in callers]
    await slow_model.asked(1 + len(callers))
    for caller in callers:
        await stalls(caller)  # one body may be in the sockets' buffers, all of it
    assert measured.rss - before < GROWTH
    go_on.set()
    for caller in callers:
        answer = await caller.answer(patience_s=60)
        assert (answer.status, answer.body) == (200, b"%d" % size)
        caller.close()
    assert all(await asyncio.gather(*sending))


async def test_a_slow_reader_that_goes_stops_the_model(gateway: Served, model: Recorder) -> None:
    async def much(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED + chunk(b"x" * MUCH))
        wire.ended = True

    model.behave = much
    caller = await gateway.connect(receive_buffer=64 * 1024)
    await caller.send(post())
    wire = await model.asked()
    assert await stalls(wire) < MUCH
    caller.close()
    await model.left()
    assert wire.sent < MUCH
