"""OpenAI's dialect as HTTP: where a request goes, what of it, and the shape of every refusal, with either client."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.gateway.conftest import Client, Served, post, serving, settings_for, started
from tests.gateway.recording import CHUNKED, LAST_CHUNK, Recorder, always, chunk, framed, recorder
from tests.gateway.wire import Message, Wire

MAX_BODY = 100_000
MESSAGES = [{"role": "user", "content": "x"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": MESSAGES},
    "completions": {"prompt": "x"},
    "embeddings": {"input": "x"},
}
CHAT = "chat/completions"


@pytest.fixture(scope="module")
def gateway(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(settings_for(client, tmp_path_factory.mktemp("gateway"), max_body=MAX_BODY)) as served:
        yield served


@pytest.fixture
async def acme(gateway: Served) -> AsyncIterator[Recorder]:
    """The server of the client `acme`'s own model `m`."""
    async with recorder("acme") as server:
        gateway.route(server, client="acme")
        yield server


def asked(endpoint: str, body: Any, *headers: bytes) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return post(content, *headers, path=b"/v1/" + endpoint.encode())


def error_of(answer: Message) -> dict[str, Any]:
    """The error, whose shape is OpenAI's."""
    body = json.loads(answer.body)
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert answer.all(b"content-type") == [b"application/json"]
    assert len(answer.all(b"x-request-id")) == 1
    return error


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_it_goes_to_the_model_s_predict_path(caller: Wire, model: Recorder, endpoint: str) -> None:
    model.behave = always(framed(b'{"id": "1"}', b"Content-Type: application/json"))
    await caller.send(asked(endpoint, {"model": "m", **ENDPOINTS[endpoint]}))
    answer = await caller.answer()
    assert (answer.status, answer.body) == (200, b'{"id": "1"}')
    assert len(answer.all(b"x-request-id")) == 1
    (request,) = model.requests
    assert request.target == b"/predict"
    assert json.loads(request.body) == {"model": "m", **ENDPOINTS[endpoint]}


async def test_a_stream_of_it(caller: Wire, model: Recorder) -> None:
    events = [b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"]
    model.behave = always(CHUNKED + b"".join(map(chunk, events)) + LAST_CHUNK)
    await caller.send(asked(CHAT, {"model": "m", "messages": MESSAGES, "stream": True}))
    answer = await caller.answer()
    assert (answer.body, answer.all(b"content-type")) == (b"".join(events), [b"text/event-stream"])


async def test_chunks_go_up_too(caller: Wire, model: Recorder) -> None:
    body = json.dumps({"model": "m", "messages": MESSAGES}).encode()
    chunks = b"".join(chunk(body[at : at + 5]) for at in range(0, len(body), 5)) + LAST_CHUNK
    await caller.send(started(b"Transfer-Encoding: chunked", body=chunks, path=b"/v1/chat/completions"))
    assert (await caller.answer()).status == 200
    assert [json.loads(request.body) for request in model.requests] == [json.loads(body)]


NAMED = {
    "organization": ({}, [b"OpenAI-Organization: acme"]),
    "body": ({"client_code": "acme"}, []),
    "user-id": ({}, [b"X-User-ID: acme"]),
    "all": ({"client_code": "acme"}, [b"OpenAI-Organization: acme", b"X-User-ID: acme"]),
}


@pytest.mark.parametrize(("fields", "headers"), NAMED.values(), ids=NAMED)
async def test_the_client(
    caller: Wire, model: Recorder, acme: Recorder, fields: dict[str, str], headers: list[bytes]
) -> None:
    await caller.send(asked(CHAT, {"model": "m", "messages": MESSAGES, **fields}, *headers))
    assert (await caller.answer()).status == 200
    (request,) = acme.requests
    assert json.loads(request.body) == {"model": "m", "messages": MESSAGES}, "without a client_code"
    assert not model.requests
    await caller.send(asked(CHAT, {"model": "m", "messages": MESSAGES}))
    assert (await caller.answer()).status == 200
    assert len(model.requests) == 1, "whoever names no client has the shared one"


async def test_values_that_json_can_hold_go_up_unchanged(caller: Wire, model: Recorder, acme: Recorder) -> None:
    """Taking `client_code` out must not change anything else: large numbers, escapes, nesting."""
    rest = b'"model": "m", "messages": [{"role": "user", "content": "\\u00e9\\ud83d\\ude00 client_code \\" x"}], '
    rest += b'"seed": 9007199254740993, "x": {"client_code": "inner"}'
    await caller.send(asked(CHAT, b'{"client_code": "acme", ' + rest + b"}"))
    assert (await caller.answer()).status == 200
    (request,) = acme.requests
    assert json.loads(request.body) == json.loads(b"{" + rest + b"}")


WRONG: dict[str, tuple[Any, list[bytes], set[int], str | None]] = {
    "no-model": ({"messages": MESSAGES}, [], {400, 422}, "model"),
    "model-is-a-number": ({"model": 1, "messages": MESSAGES}, [], {400, 422}, "model"),
    "model-is-null": ({"model": None, "messages": MESSAGES}, [], {400, 422}, "model"),
    "model-is-a-list": ({"model": ["m"], "messages": MESSAGES}, [], {400, 422}, "model"),
    "model-is-empty": ({"model": "", "messages": MESSAGES}, [], {400, 404, 422}, "model"),
    "model-is-unknown": ({"model": "none", "messages": MESSAGES}, [], {404}, "model"),
    "model-is-a-path": ({"model": "../m", "messages": MESSAGES}, [], {400, 404, 422}, "model"),
    "model-is-long": ({"model": "m" * 10_000, "messages": MESSAGES}, [], {400, 404, 422}, "model"),
    "no-messages": ({"model": "m"}, [], {400, 422}, "messages"),
    "prompt-in-place-of-messages": ({"model": "m", "prompt": "x"}, [], {400, 422}, None),
    "not-json": (b"{", [], {400, 422}, None),
    "not-utf-8": (b'{"model": "m", "messages": "\xff"}', [], {400, 422}, None),
    "empty": (b"", [], {400, 422}, None),
    "a-list": ([], [], {400, 422}, None),
    "a-string": (b'"m"', [], {400, 422}, None),
    "nan": (b'{"model": "m", "messages": [], "x": NaN}', [], {400, 422}, None),
    "deep": (b'{"model": "m", "messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", [], {400, 422}, None),
    "too-large": (b"{" + b" " * MAX_BODY + b"}", [], {413}, None),
    "client-is-a-number": ({"model": "m", "messages": MESSAGES, "client_code": 1}, [], {400, 422}, "client_code"),
    "client-is-a-path": ({"model": "m", "messages": MESSAGES, "client_code": "../x"}, [], {400, 422}, "client_code"),
    "organization-is-a-path": ({"model": "m", "messages": MESSAGES}, [b"OpenAI-Organization: ../x"], {400, 401, 404, 422}, None),
    "two-clients": ({"model": "m", "messages": MESSAGES, "client_code": "acme"}, [b"OpenAI-Organization: bolt"],
                    {400, 401, 403, 404, 422}, None),
    "two-clients-in-the-head": ({"model": "m", "messages": MESSAGES}, [b"OpenAI-Organization: bolt", b"X-User-ID: acme"],
                                {400}, None),
    "two-models": (b'{"model": "m", "model": "none", "messages": [{"role": "user", "content": "x"}]}', [], {400, 404, 422}, None),
}  # fmt: skip


@pytest.mark.parametrize(("body", "headers", "statuses", "param"), WRONG.values(), ids=WRONG)
async def test_what_is_wrong_is_refused_in_openai_s_shape(
    caller: Wire,
    model: Recorder,
    acme: Recorder,
    body: Any,
    headers: list[bytes],
    statuses: set[int],
    param: str | None,
) -> None:
    await caller.send(asked(CHAT, body, *headers))
    answer = await caller.answer()
    assert answer.status in statuses, answer
    error = error_of(answer)
    assert param is None or error["param"] in (param, None)
    assert (model.requests, acme.requests) == ([], [])


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("method", [b"GET", b"PUT", b"DELETE"])
async def test_another_method(caller: Wire, model: Recorder, endpoint: str, method: bytes) -> None:
    await caller.send(b"%s /v1/%s HTTP/1.1\r\nHost: x\r\n\r\n" % (method, endpoint.encode()))
    answer = await caller.answer()
    assert answer.status == 405
    error_of(answer)
    assert not model.requests


async def test_the_model_s_own_refusal_is_passed_on(caller: Wire, model: Recorder) -> None:
    refusal = b'{"error": {"message": "too long", "type": "x", "param": null, "code": null}}'
    model.behave = always(framed(refusal, b"Content-Type: application/json", status=b"400 Bad Request"))
    await caller.send(asked(CHAT, {"model": "m", "messages": MESSAGES}))
    answer = await caller.answer()
    assert (answer.status, answer.body) == (400, refusal)


async def test_a_model_server_that_breaks(gateway: Served, caller: Wire, model: Recorder) -> None:
    model.behave = always(b"no http at all\r\n\r\n")
    await caller.send(asked(CHAT, {"model": "m", "messages": MESSAGES}))
    answer = await caller.answer()
    assert answer.status == 502
    error_of(answer)
