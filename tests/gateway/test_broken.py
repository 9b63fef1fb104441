"""Model servers that break off, break rules or close too soon, and clients that hang up, with either client."""

import asyncio
from collections.abc import Callable

import pytest

from tests.fakes.broker import free_port
from tests.gateway.conftest import Served, post, started
from tests.gateway.recording import CHUNKED, LAST_CHUNK, Recorder, always, chunk, digest, framed, once, silent
from tests.gateway.wire import Wire

BROKEN = {
    "no-http": b"no http at all\r\n\r\n",
    "other-protocol": b"SSH-2.0-x\r\n",
    "status-of-letters": b"HTTP/1.1 abc OK\r\nContent-Length: 2\r\n\r\n{}",
    "status-of-four": b"HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\n{}",
    "version": b"HTTP/3.7 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "http-0.9": b"{}",
    "length-of-letters": b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}",
    "length-below-nothing": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
    "two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length-and-chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "nul-in-header": b"HTTP/1.1 200 OK\r\nX: \x00\r\nContent-Length: 2\r\n\r\n{}",
    "space-before-colon": b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\n{}",
    "head-without-end": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n",
    "head-too-large": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
    "headers-too-many": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000 + b"Content-Length: 2\r\n\r\n{}",
    "nothing": b"",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nrubbish",
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN)
async def test_an_answer_that_is_none(gateway: Served, caller: Wire, model: Recorder, raw: bytes) -> None:
    """502; or, where one framing wins by the rules, the right answer. Never something else, and it is not kept."""
    model.behave = once(raw)
    await caller.send(post())
    answer = await caller.final()
    assert answer.status == 502 or (b"\r\n\r\n" in raw and answer.status == 200 and answer.body == b"{}"), answer
    asked = len(model.requests)
    assert asked == 1, "a request that was sent is not sent again"
    await served_again(gateway, model)


async def served_again(gateway: Served, model: Recorder) -> None:
    """The next two requests get their own answers."""
    model.behave = model.echo
    caller = await gateway.connect()
    for body in (b'{"n": 1}', b'{"n": 2}'):
        await caller.send(post(body))
        answer = await caller.answer()
        assert (answer.status, answer.body) == (200, digest("model", body))
    caller.close()


TORN = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
    "within-a-chunk": CHUNKED + b"9\r\n{}",
    "between-chunks": CHUNKED + chunk(b"{}"),
    "before-the-last-end": CHUNKED + chunk(b"{}") + b"0\r\n",
    "bad-size": CHUNKED + chunk(b"{}") + b"x\r\n",
    "bad-size-below-nothing": CHUNKED + chunk(b"{}") + b"-1\r\n",
    "bad-chunk-end": CHUNKED + b"2\r\n{}xx0\r\n\r\n",
}


@pytest.mark.parametrize("raw", TORN.values(), ids=TORN)
async def test_a_torn_answer_is_never_a_whole_one(gateway: Served, caller: Wire, model: Recorder, raw: bytes) -> None:
    async def tear(wire: Wire) -> None:
        await wire.message()
        head, between, body = raw.partition(b"\r\n\r\n")
        await wire.send(head + between)
        await asyncio.sleep(0.05)  # whoever sees all of it at once may still answer 502
        await wire.send(body)

    model.behave = tear
    await caller.send(post())
    found = await asyncio.wait_for(caller.message(b"POST"), 10)
    assert found is None or found.status == 502, f"a whole answer: {found}"
    if found is None:
        assert caller.ended
    assert len(model.requests) == 1
    await served_again(gateway, model)


async def test_more_than_was_promised_reaches_nobody(gateway: Served, caller: Wire, model: Recorder) -> None:
    model.behave = always(framed(b"{}") + framed(b'"of somebody else"'))
    await caller.send(post())
    assert (await caller.answer()).body == b"{}"
    await served_again(gateway, model)
    await asyncio.sleep(0.05)
    assert bytes(caller.received[caller.at :]) == b""


HANG_UPS: dict[str, Callable[[Wire], None]] = {"closed": Wire.close, "reset": Wire.reset}


@pytest.mark.parametrize("hang_up", HANG_UPS.values(), ids=HANG_UPS)
@pytest.mark.parametrize("when", ["before", "within-length", "within-chunks", "uploading", "uploading-chunks"])
async def test_a_client_that_hangs_up_stops_the_model(
    gateway: Served, caller: Wire, model: Recorder, when: str, hang_up: Callable[[Wire], None]
) -> None:
    async def begin(wire: Wire) -> None:
        await wire.message()
        await wire.send(framed(b"x" * 9)[:-7] if when == "within-length" else CHUNKED + chunk(b"xx"))
        await silent(wire)

    model.behave = begin if when.startswith("within") else silent
    sent = {
        "uploading": started(b"Content-Length: 9", body=b"xx"),
        "uploading-chunks": started(b"Transfer-Encoding: chunked", body=b"2\r\nxx\r\n"),
    }
    await caller.send(sent.get(when, post()))
    wire = await model.asked()
    if when.startswith("within"):
        await caller.until(b"xx")
    async with asyncio.timeout(10):
        while b"\r\n\r\n" not in wire.received:
            await asyncio.sleep(0.01)
    hang_up(caller)
    await model.left(5)
    if when.startswith("uploading"):
        assert not model.requests, "it never was whole"
    await served_again(gateway, model)


@pytest.mark.parametrize("when", ["before", "within"])
async def test_a_half_closed_client_gets_all_or_stops_the_model(caller: Wire, model: Recorder, when: str) -> None:
    go_on = asyncio.Event()

    async def slow(wire: Wire) -> None:
        await wire.message()
        await wire.send(CHUNKED + chunk(b"xx") if when == "within" else b"")
        await asyncio.wait(
            {asyncio.ensure_future(go_on.wait()), asyncio.ensure_future(silent(wire))}, return_when="FIRST_COMPLETED"
        )
        await wire.send((b"" if when == "within" else CHUNKED + chunk(b"xx")) + chunk(b"yy") + LAST_CHUNK)

    model.behave = slow
    await caller.send(post())
    await model.asked()
    if when == "within":
        await caller.until(b"xx")
        caller.at = 0
    caller.finish()
    await asyncio.sleep(0.3)
    go_on.set()
    answer = await asyncio.wait_for(caller.message(b"POST"), 10)
    assert answer is None or answer.body == b"xxyy"
    await model.left()


@pytest.mark.parametrize("closing", [Wire.close, Wire.reset], ids=["closed", "reset"])
async def test_a_connection_that_the_model_closed_while_idle(
    caller: Wire, model: Recorder, closing: Callable[[Wire], None]
) -> None:
    """It is seen before the next request, which goes on a new one: nobody notices."""

    async def one(wire: Wire) -> None:
        request = await wire.message()
        assert request is not None
        await wire.send(framed(digest("model", request.body)))
        await go.wait()
        closing(wire)

    model.behave = one
    for number in range(3):
        go = asyncio.Event()
        await caller.send(post(b"%d" % number))
        assert (await caller.answer()).body == digest("model", b"%d" % number)
        go.set()
        await asyncio.sleep(0.1)
    assert [request.body for request in model.requests] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("closing", [Wire.close, Wire.reset], ids=["closed", "reset"])
async def test_a_request_that_was_sent_is_never_sent_twice(
    gateway: Served, caller: Wire, model: Recorder, closing: Callable[[Wire], None]
) -> None:
    """The model closes a kept connection right when it has the next request on it: whether it did its work, nobody knows."""

    async def one_and_a_half(wire: Wire) -> None:
        request = await wire.message()
        if request and request.body == b"first":
            await wire.send(framed(b"{}"))
            await wire.message()
        closing(wire)

    model.behave = one_and_a_half
    await caller.send(post(b"first"))
    assert (await caller.answer()).status == 200
    await caller.send(post(b"second"))
    assert (await caller.answer()).status == 502
    assert [request.body for request in model.requests] == [b"first", b"second"]


async def test_a_model_that_cannot_be_reached(gateway: Served, caller: Wire, model: Recorder) -> None:
    gateway.route_urls(f"http://127.0.0.1:{free_port()}", model="away")
    await caller.send(post(path=b"/inference/infer/away"))
    assert (await caller.answer()).status == 502
    await served_again(gateway, model)
