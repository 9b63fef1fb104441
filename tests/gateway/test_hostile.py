"""What somebody may do to all others without a key or a model: each was seen to work once."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from tests.gateway.conftest import INFER, Client, Served, post, serving, settings_for, started
from tests.gateway.recording import Recorder, chunk, silent
from tests.gateway.wire import Wire

MAX_BODY = 256 * 1024


@pytest.fixture(scope="module")
def gateway(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = settings_for(client, tmp_path_factory.mktemp("gateway"), max_body=MAX_BODY, first_byte_s=0.5)
    with serving(settings) as served:
        yield served


async def test_a_queued_request_whose_connection_closes_stops_no_clocks(gateway: Served, model: Recorder) -> None:
    hostile = await gateway.connect()
    refused = b"POST /inference/infer/none HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
    await hostile.send(refused + post(b"x" * 200_000))
    await hostile.end()
    model.behave = silent
    for _ in range(3):
        caller = await gateway.connect()
        await caller.send(post())
        assert (await caller.answer()).status == 504
        caller.close()


async def test_whoever_reads_no_answers_is_not_read(gateway: Served, model: Recorder) -> None:
    hostile = await gateway.connect(receive_buffer=4096)
    some = post(path=b"/inference/infer/none") * 1000
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 256 * 1024 * 1024:
            await asyncio.wait_for(hostile.send(some), 3)
            sent += len(some)
    hostile.reset()
    caller = await gateway.connect()
    await caller.send(post())
    assert (await caller.answer()).status == 200
    caller.close()


async def test_many_requests_at_once_are_all_answered_in_order(caller: Wire, model: Recorder) -> None:
    asked = [post(b'{"n": %d}' % number) for number in range(300)]
    sending = asyncio.create_task(caller.send(b"".join(asked)))
    for _ in asked:
        assert (await caller.answer()).status == 200
    await sending
    assert [json.loads(request.body)["n"] for request in model.requests] == list(range(300))


async def test_a_call_that_is_too_large_in_the_end_is_not_made(gateway: Served, model: Recorder) -> None:
    hostile = await gateway.connect()
    path = b"/v1/completions"
    await hostile.send(started(b"Transfer-Encoding: chunked", path=path))
    await asyncio.sleep(0.2)  # its head is read by itself
    call = chunk(b'{"model": "m", "prompt": "x"}')
    await hostile.send(call + chunk(b" " * MAX_BODY) + b"0\r\n\r\n")
    assert (await hostile.final()).status == 413
    assert await hostile.end() == b""
    assert model.requests == []


@pytest.mark.parametrize("path", [b"/v1/completions", INFER])
async def test_a_body_nested_too_deeply_is_an_answer_at_once(gateway: Served, model: Recorder, path: bytes) -> None:
    deep = b'{"model": "m", "client_code": "", "prompt": %s%s}' % (b"[" * 400, b"]" * 400)
    caller = await gateway.connect()
    await caller.send(post(deep, path=path))
    assert (await caller.answer()).status in (200, 400)
    caller.close()


async def test_blank_lines_without_end(gateway: Served) -> None:
    hostile = await gateway.connect()
    await hostile.send(b"\r\n" * 50_000)
    assert (await hostile.end()).startswith(b"HTTP/1.1 400 ")


async def test_upgrades_in_a_row(caller: Wire, model: Recorder) -> None:
    asked = 1500
    sending = asyncio.create_task(caller.send(post(b"{}", b"Connection: upgrade", b"Upgrade: h2c") * asked))
    for _ in range(asked):
        assert (await caller.answer()).status == 200
    await sending
