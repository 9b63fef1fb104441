"""Whatever a client sends, a model server gets the requests that were meant, whole and apart, or none: the corpus, with either client."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.gateway import corpus_framing, corpus_heads, corpus_targets
from tests.gateway.conftest import INFER, Client, Served, post, serving, settings_for
from tests.gateway.corpus import ACME, BOLT, MAX_BODY, PATHS, SHARED, Case, Sent
from tests.gateway.recording import Recorder, digest, recorder
from tests.gateway.wire import Wire

CASES = [*corpus_framing.CASES, *corpus_heads.CASES, *corpus_targets.CASES]
PATIENCE_S = 3
PASSED_UP = {
    b"host", b"accept", b"accept-encoding", b"connection", b"user-agent", b"content-type", b"content-length",
    b"transfer-encoding", b"traceparent", b"x-request-id",
}  # fmt: skip
SINGLE = PASSED_UP - {b"accept", b"accept-encoding", b"connection"}
SENTINEL = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
DRIBBLED = 4096
"""Bytes that are sent one by one where a case is sent in pieces; the rest follows at once."""
SENDING_S = 60
"""What that may take on a busy machine; only then is an answer waited for."""


@pytest.fixture(scope="module")
def gateway(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(settings_for(client, tmp_path_factory.mktemp("gateway"), max_body=MAX_BODY)) as served:
        yield served


@pytest.fixture
async def servers(gateway: Served) -> AsyncIterator[dict[str, Recorder]]:
    """The three model servers, by name."""
    async with contextlib.AsyncExitStack() as stack:
        started = {name: await stack.enter_async_context(recorder(name)) for name in (ACME, BOLT, SHARED)}
        for name, server in started.items():
            gateway.route(server, client="" if name == SHARED else name, path=PATHS[name])
        yield started


def test_the_corpus_is_large_and_its_names_are_its_own() -> None:
    assert len(CASES) >= 100
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.mark.parametrize("dribbled", [False, True], ids=["whole", "dribbled"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_smuggling(
    gateway: Served, servers: dict[str, Recorder], client: Client, case: Case, dribbled: bool
) -> None:
    wire = await gateway.connect()
    sending = asyncio.create_task(send(wire, case.raw, dribbled))
    try:
        if dribbled:
            await asyncio.wait({sending}, timeout=SENDING_S)
        sent = await answered(wire, case)
        await asyncio.wait({sending}, timeout=0 if case.closed else PATIENCE_S)
        await in_step(wire, closed=case.closed)
        await reached_nobody_else(servers, sent, client)
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        wire.close()
    await others_are_served(gateway, servers)
    await reached_nobody_else(servers, sent, client, more=2)


async def send(wire: Wire, raw: bytes, dribbled: bool) -> None:
    for at in range(min(len(raw), DRIBBLED) if dribbled else 0):
        await wire.send(raw[at : at + 1])
        await asyncio.sleep(0)
    await wire.send(raw[DRIBBLED:] if dribbled else raw)


async def answered(wire: Wire, case: Case) -> list[Sent]:
    """Read the answers. Returns what the model servers have got, then."""
    sent = []
    asked = case.raw.lstrip().split(b" ")[0]
    for number, expected in enumerate(case.answers):
        status = (await wire.final(asked, PATIENCE_S)).status
        assert status in expected.statuses, f"answer {number} is {status}: {bytes(wire.received[-300:])!r}"
        if status == 200 and expected.sent is not None:
            sent.append(expected.sent)
        # Who refuses one may close, and answers no other.
        if status != 200 and number + 1 < len(case.answers) and not await more(wire):
            break
    return sent


async def more(wire: Wire) -> bool:
    """Whether there are bytes beyond those that were understood, or will be."""
    return len(wire.received) > wire.at or await asyncio.wait_for(wire.receive(), PATIENCE_S)


async def in_step(wire: Wire, *, closed: bool) -> None:
    """The connection is closed, or the very next request is understood, and nothing comes in between or afterwards."""
    if closed:
        assert await wire.end(PATIENCE_S) == b"", "something came after the last answer"
        return
    await wire.send(SENTINEL)
    if not await more(wire):
        return
    answer = await wire.answer(b"GET", PATIENCE_S)
    assert (answer.status, b"Mini Studio" in answer.body) == (200, True)
    assert await wire.end(PATIENCE_S) == b""


async def reached_nobody_else(servers: dict[str, Recorder], sent: list[Sent], client: Client, more: int = 0) -> None:
    """Each server got what was meant for it, and on every connection nothing that is no request, unless it was broken off."""
    for name, server in servers.items():
        requests = server.requests
        meant = [item.body for item in sent if item.server == name]
        extra = more if name != SHARED else 0
        assert [request.body for request in requests][: len(meant)] == meant, f"at {name}"
        assert len(requests) == len(meant) + extra, f"at {name}: {requests}"
        for request in requests:
            assert request.start == b"POST %s HTTP/1.1" % PATHS[name].encode()
            assert request.all(b"host") == [server.url.removeprefix("http://").encode()]
            assert request.names <= PASSED_UP, request.names - PASSED_UP
            assert all(len(request.all(field)) <= 1 for field in SINGLE), request.headers
        # httpx forgets now and then to close a connection whose request was given up; nobody uses it again.
        for wire in server.torn if client == "fast" else ():
            async with asyncio.timeout(PATIENCE_S):
                while not wire.ended:
                    await asyncio.sleep(0.01)


async def others_are_served(gateway: Served, servers: dict[str, Recorder]) -> None:
    """Two clients at once, twice, on connections of their own: each gets its own server's answer to its own question."""

    async def ask(name: str) -> None:
        wire = await gateway.connect()
        body = b'{"client": "%s"}' % name.encode()
        await wire.send(post(body, b"X-User-ID: " + name.encode(), b"Connection: close", path=INFER))
        answer = await wire.answer()
        assert (answer.status, answer.body) == (200, digest(name, body))
        assert await wire.end() == b""
        wire.close()

    for _ in range(2):
        await asyncio.gather(ask(ACME), ask(BOLT))
