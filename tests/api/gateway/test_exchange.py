"""One exchange, whichever client carries it out: its replicas, its account, its limits."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.gateway.dialect import Call
from api.gateway.exchange import beginning
from api.gateway.headers import lines
from api.gateway.limits import Admission
from api.gateway.tokens import reported
from api.gateway.usage import Used
from events.types import DeploymentKind, DeploymentStatus
from events.usage import MAX_TOKENS
from mini_studio.errors import BadRequest, Invalid, RateLimited
from mini_studio.records.routes import Route
from tests.fakes.broker import free_port
from tests.fakes.upstream import Upstream, upstream
from tests.fakes.waiting import until

INFER = "/inference/infer/m"
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
USAGE = b'{"choices": [{"text": "a"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}'
HEADERS = [(b"x-ratelimit-limit-requests", b"9")]


class Account:
    """In the place of the usage log and of the limits: what they are told."""

    def __init__(self, app: FastAPI) -> None:
        self.used: list[Used] = []
        self.left: list[int | None] = []
        self.full = False
        app.state.exchanger.usage.add = self.used.append
        app.state.exchanger.limits.admit = self.admit

    def admit(self, client: str) -> Admission:
        if self.full:
            raise RateLimited("too many", retry_after_s=1.2, headers=HEADERS)
        return Admitted(self.left)


class Admitted(Admission):
    __slots__ = ("_left",)

    def __init__(self, left: list[int | None]) -> None:
        super().__init__()
        self._left = left

    @property
    def lines(self) -> bytes:
        return lines(HEADERS)

    def left(self, tokens: int | None) -> None:
        self._left.append(tokens)


@pytest.fixture
async def servers() -> AsyncIterator[list[Upstream]]:
    async with upstream() as one, upstream() as other:
        yield [one, other]


@pytest.fixture
def account(app: FastAPI, url: str) -> Account:
    return Account(app)


def put(app: FastAPI, *endpoints: str, **changes: Any) -> None:
    route = Route(
        deployment_id="dep_1", name="ft-m", client_code="", kind=DeploymentKind.FINE_TUNED, model="m", base_model="base",
        requested_at="", revision=1, **{"status": DeploymentStatus.READY, "endpoints": list(endpoints), **changes},
    )  # fmt: skip
    app.state.routes.put("dep_1", route, 1)


async def test_the_account_of_an_answer(
    app: FastAPI, client: httpx.AsyncClient, account: Account, servers: list[Upstream]
) -> None:
    servers[0].answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(USAGE), USAGE)
    put(app, servers[0].url)
    for _ in range(3):  # the head of the later ones has been parsed before
        answer = await client.post(INFER, content=b'{"prompt": "x"}', headers={"X-User-ID": "acme"})
        assert (answer.content, answer.headers["x-ratelimit-limit-requests"]) == (USAGE, "9")
    await until(lambda: len(account.used) == 3, 5)
    used = account.used[0]
    assert used[:7] == ("acme", "m", "dep_1", 1, 3, 4, 200)
    assert used.first_byte_ms is not None
    assert 0 < used.first_byte_ms <= used.total_ms
    assert account.left == [7] * 3


async def test_who_is_over_a_limit_is_told_when_to_come_back(
    app: FastAPI, client: httpx.AsyncClient, account: Account, servers: list[Upstream]
) -> None:
    put(app, servers[0].url)
    account.full = True
    refused = await client.post(INFER, content=b"{}")
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limit_exceeded")
    assert (refused.headers["retry-after"], refused.headers["x-ratelimit-limit-requests"]) == ("2", "9")
    refused = await client.post("/v1/chat/completions", json=CHAT)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    await until(lambda: [used.status for used in account.used] == [429, 429], 5)
    assert servers[0].connections == 0
    assert account.left == []


@pytest.mark.parametrize("answer", [BUSY, None], ids=["busy", "refusing"])
async def test_another_replica_answers_in_place_of_a_failing_one(
    app: FastAPI, client: httpx.AsyncClient, account: Account, servers: list[Upstream], answer: bytes | None
) -> None:
    servers[0].answer = answer
    put(app, servers[0].url if answer else f"http://127.0.0.1:{free_port()}", servers[1].url)
    asked = [b'{"prompt": "%d"}' % number for number in range(20)]  # some of them would go to either
    for body in asked:
        assert (await client.post(INFER, content=body)).status_code == 200
    assert servers[1].bodies == asked
    assert bool(servers[0].bodies) == bool(answer)
    assert {*servers[0].bodies} <= {*asked}
    await until(lambda: [used.status for used in account.used] == [200] * 20, 5)


async def test_the_second_failure_is_the_answer(
    app: FastAPI, client: httpx.AsyncClient, account: Account, servers: list[Upstream]
) -> None:
    servers[0].answer = servers[1].answer = BUSY
    put(app, servers[0].url, servers[1].url)
    found = await client.post(INFER, content=b"{}")
    assert (found.status_code, found.content) == (503, b"busy")
    assert [len(server.bodies) for server in servers] == [1, 1]


async def test_a_call_of_the_base_model_goes_up_by_the_model_s_own_name(
    app: FastAPI, client: httpx.AsyncClient, account: Account, servers: list[Upstream]
) -> None:
    put(app, servers[0].url)
    answer = await client.post("/v1/chat/completions", json=CHAT | {"client_code": "acme"})
    assert answer.status_code == 200
    assert httpx.Response(200, content=servers[0].bodies[0]).json() == CHAT | {"model": "m"}
    await until(lambda: [used.client_code for used in account.used] == ["acme"], 5)


async def test_who_hangs_up_has_an_account_too(
    app: FastAPI, url: str, account: Account, servers: list[Upstream]
) -> None:
    servers[0].answer = None
    put(app, servers[0].url)
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}" % INFER.encode())
    await until(lambda: servers[0].bodies == [b"{}"], 5)
    writer.close()
    await until(lambda: [used.status for used in account.used] == [499], 5)
    assert account.left == [None]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", b'{"prompt": "x"}', "model"),
        ("/v1/completions", b'{"model": 1, "prompt": "x"}', "model"),
        ("/v1/completions", b'{"model": "m", "messages": [{}]}', "messages"),
        ("/v1/chat/completions", b'{"model": "m", "messages": []}', "messages"),
        ("/v1/embeddings", b'{"model": "m"}', "input"),
        ("/v1/embeddings", b'{"model": "m", "input": "x", "client_code": "../x"}', "client_code"),
        ("/v1/embeddings", b"[]", None),
        ("/v1/embeddings", b"{", None),
    ],
)
def test_bodies_that_do_not_fit(path: str, body: bytes, field: str | None) -> None:
    with pytest.raises((BadRequest, Invalid)) as refused:
        Call(path, body)
    assert [detail["field"] for detail in refused.value.details] == ([field] if field else [])


@pytest.mark.parametrize(
    ("end", "found"),
    [
        (USAGE, (3, 4)),
        (b'{"usage": {"prompt_tokens": 3, "total_tokens": 3}}', (3, None)),
        (
            b'data: {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}\n\ndata: {"usage": null}\n\ndata: [DONE]\n\n',
            (1, 2),
        ),
        (rb'{"text": "\"usage\": {\"prompt_tokens\": 9}"}', (None, None)),
        (b'{"usage": {"prompt_tokens": -1, "completion_tokens": 999999999999}}', (None, MAX_TOKENS - 1)),
        (b'{"usage": {"prompt_tokens": 1000000000000, "completion_tokens": 1.5}}', (None, None)),
        (b'{"usage": {"prompt_tokens": true, "completion_tokens": "many"}}', (None, None)),
        (b"{}", (None, None)),
    ],
)
def test_tokens_that_a_model_server_reports(end: bytes, found: tuple[int | None, int | None]) -> None:
    assert reported(end) == found


def test_beginnings() -> None:
    assert beginning(b'{"prompt": "abc"}') == b"abc"
    assert beginning(b'{"messages": [{"role": "user"}]}') == b'[{"role":"user"}]'
    assert beginning(b'{"prompt": "%s"}' % (b"x" * 1000)) == b"x" * 512
    assert [beginning(body) for body in (b"{", b"[]", b"{}", b'{"prompt": "%s"}' % (b"x" * 70_000))] == [None] * 4
