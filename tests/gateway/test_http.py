"""HTTP/1.1 as a client of the gateway sees it, between its socket and the model server's, with either client."""

import asyncio

import pytest

from tests.gateway.conftest import INFER, MAX_BODY, Served, post, started
from tests.gateway.recording import CHUNKED, LAST_CHUNK, Recorder, always, chunk, digest, framed, once
from tests.gateway.wire import PATIENCE_S, Wire

TE = b"Transfer-Encoding: chunked"
EXPECT = b"Expect: 100-continue"
BODIES = {"empty": b"", "small": b'{"prompt": "x"}', "large": b'{"prompt": "' + b"x" * 300_000 + b'"}'}


def pieces(body: bytes, size: int = 7_000) -> bytes:
    return b"".join(chunk(body[at : at + size]) for at in range(0, len(body), size)) + LAST_CHUNK


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_goes_up_as_it_is(caller: Wire, model: Recorder, body: bytes, framing: str) -> None:
    for _ in range(2):
        await caller.send(post(body) if framing == "length" else started(TE, body=pieces(body)))
        answer = await caller.final()
        assert (answer.status, answer.body) == (200, digest("model", body))
    assert [request.body for request in model.requests] == [body, body]


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("framing", ["length", "chunks", "end"])
async def test_a_body_comes_down_as_it_is(caller: Wire, model: Recorder, body: bytes, framing: str) -> None:
    answers = {
        "length": framed(body),
        "chunks": CHUNKED + pieces(body),
        "end": b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n" + body,
    }
    model.behave = once(answers[framing]) if framing == "end" else always(answers[framing])
    for _ in range(2):
        await caller.send(post())
        answer = await caller.final()
        assert (answer.status, answer.body) == (200, body)


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS"])
async def test_only_post_asks_a_model(caller: Wire, model: Recorder, method: bytes) -> None:
    for _ in range(2):
        await caller.send(b"%s %s HTTP/1.1\r\nHost: x\r\n\r\n" % (method, INFER))
        answer = await caller.answer(method)
        assert (answer.status, answer.all(b"allow")) == (405, [b"POST"])
    await caller.send(post())
    assert (await caller.answer()).status == 200
    assert len(model.requests) == 1


async def test_three_requests_in_one_packet_are_answered_in_order(caller: Wire, model: Recorder) -> None:
    bodies = [b'{"n": %d}' % number for number in range(3)]
    slow = asyncio.Event()

    async def first_last(wire: Wire) -> None:
        while request := await wire.message():
            if request.body == bodies[0]:
                await slow.wait()
            await wire.send(framed(digest("model", request.body)))

    model.behave = first_last
    await caller.send(b"".join(post(body) for body in bodies))
    await model.asked()
    await asyncio.sleep(0.2)
    assert not caller.received
    slow.set()
    for body in bodies:
        assert (await caller.answer()).body == digest("model", body)


async def test_a_hundred_requests_at_once_on_one_connection(caller: Wire, model: Recorder) -> None:
    bodies = [b"x" * number for number in range(100)]
    sending = asyncio.create_task(caller.send(b"".join(post(body) for body in bodies)))
    for body in bodies:
        assert (await caller.answer()).body == digest("model", body)
    assert await sending


async def test_a_client_that_expects_to_be_told_to_go_on_is_told(caller: Wire, model: Recorder) -> None:
    for version in (b"100-continue", b"100-Continue"):
        await caller.send(started(b"Expect: " + version, b"Content-Length: 2"))
        assert (await caller.answer()).status == 100
        await caller.send(b"{}")
        assert (await caller.answer()).status == 200
    await caller.send(started(EXPECT, TE))
    assert (await caller.answer()).status == 100
    await caller.send(pieces(b"{}"))
    assert (await caller.answer()).body == digest("model", b"{}")
    assert [request.body for request in model.requests] == [b"{}"] * 3


REFUSED = {
    "unknown-model": (started(EXPECT, b"Content-Length: 2", path=b"/inference/infer/none"), 404),
    "wrong-client": (started(EXPECT, b"Content-Length: 2", b"X-User-ID: ../x"), 422),
    "too-large": (started(EXPECT, b"Content-Length: %d" % (MAX_BODY + 1)), 413),
    "put": (started(EXPECT, b"Content-Length: 2").replace(b"POST", b"PUT"), 405),
}


@pytest.mark.parametrize(("raw", "status"), REFUSED.values(), ids=REFUSED)
async def test_a_client_that_expects_to_go_on_is_refused_without_its_body(
    caller: Wire, model: Recorder, raw: bytes, status: int
) -> None:
    await caller.send(raw)
    assert (await caller.answer()).status == status
    assert not model.requests
    # Whoever refuses closes the connection, or takes what comes for the body that it did not ask for.
    await caller.send(b"{}" + post())
    if await asyncio.wait_for(caller.receive(), PATIENCE_S):
        assert (await caller.answer()).status == 200


async def test_a_body_over_the_limit_is_refused_before_it_is_there(caller: Wire, model: Recorder) -> None:
    await caller.send(started(b"Content-Length: %d" % (MAX_BODY + 1), body=b"x" * 1000))
    answer = await caller.answer(patience_s=3)
    assert answer.status == 413
    assert not model.requests


async def test_an_answer_may_come_before_the_body_is_whole(gateway: Served, model: Recorder, client: str) -> None:
    async def early(wire: Wire) -> None:
        await wire.until(b"\r\n\r\n")
        await wire.send(framed(b"no", b"Connection: close", status=b"429 Too Many Requests"))
        await wire.end()

    model.behave = early
    caller = await gateway.connect()
    await caller.send(started(b"Content-Length: 1000000", body=b"x" * 1000))
    if client == "plain":  # httpx reads nothing of an answer before it has sent the whole request
        await caller.send(b"x" * 999_000)
    answer = await caller.answer(patience_s=3)
    assert (answer.status, answer.body) == (429, b"no")
    caller.close()
    await model.left()
    model.behave = model.echo
    caller = await gateway.connect()
    await caller.send(post())
    assert (await caller.answer()).body == digest("model", b"{}")
    caller.close()


@pytest.mark.parametrize("early", [b"100 Continue", b"103 Early Hints", b"102 Processing"])
async def test_what_is_said_before_an_answer_is_not_the_answer(caller: Wire, model: Recorder, early: bytes) -> None:
    model.behave = always(b"HTTP/1.1 " + early + b"\r\nLink: </x>\r\n\r\n" + framed(b"{}"))
    for _ in range(2):
        await caller.send(post())
        answer = await caller.final()
        assert (answer.status, answer.body) == (200, b"{}")


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["204", "304-with-length", "304", "200", "404"],
)
async def test_answers_without_a_body(caller: Wire, model: Recorder, raw: bytes) -> None:
    model.behave = always(raw)
    for _ in range(3):
        await caller.send(post())
        answer = await caller.answer()
        assert (answer.status, answer.body) == (int(raw[9:12]), b"")


async def test_headers_of_the_model_s_answer(caller: Wire, model: Recorder) -> None:
    hops = (b"Connection: keep-alive, X-Hop", b"X-Hop: 1", b"Keep-Alive: timeout=5", b"Proxy-Authenticate: Basic", b"Upgrade: h2c",
            b"Proxy-Connection: keep-alive", b"Trailer: X-End", b"TE: trailers")  # fmt: skip
    own = (b"Set-Cookie: a=1", b"Set-Cookie: b=2", b"Content-Type: application/json", b"X-Own: \xe9", b"Retry-After: 3")
    model.behave = always(framed(b"{}", *own, *hops))
    await caller.send(post())
    answer = await caller.answer()
    assert answer.all(b"set-cookie") == [b"a=1", b"b=2"]
    assert (answer.all(b"x-own"), answer.all(b"retry-after")) == ([b"\xe9"], [b"3"])
    hop_names = {b"x-hop", b"keep-alive", b"proxy-authenticate", b"upgrade", b"proxy-connection", b"trailer", b"te"}
    assert not hop_names & answer.names
    assert len(answer.all(b"x-request-id")) == 1


async def test_trailers_of_an_answer_do_not_break_it(caller: Wire, model: Recorder) -> None:
    model.behave = always(CHUNKED + chunk(b"{}") + b"0\r\nX-End: 1\r\n\r\n")
    for _ in range(2):
        await caller.send(post())
        assert (await caller.final()).body == b"{}"


async def test_a_request_id_is_passed_up_and_returned(caller: Wire, model: Recorder) -> None:
    await caller.send(post(b"{}", b"X-Request-ID: given.1"))
    assert (await caller.answer()).all(b"x-request-id") == [b"given.1"]
    assert model.requests[0].all(b"x-request-id") == [b"given.1"]
