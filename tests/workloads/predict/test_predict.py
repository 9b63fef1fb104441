"""`/predict` on vLLM's front: real sockets, vLLM's order of middleware. On vLLM itself: `tests/vllm/check_vllm.py`."""

import ast
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from tests.fakes.vllm_front import VllmFront
from workloads.predict import predict
from workloads.predict.predict import MAX_BODY, Predict
from workloads.serve import app as own_server
from workloads.serve.errors import BadInput
from workloads.serve.payload import parse

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
SHAPES = [
    (CHAT, "/v1/chat/completions"),
    ({"prompt": "hi"}, "/v1/completions"),
    ({"input": ["a", "b"]}, "/v1/embeddings"),
]


@contextmanager
def front(**options: Any) -> Iterator[tuple[VllmFront, TestClient]]:
    vllm = VllmFront(Predict, **options)
    with TestClient(vllm.app) as client:
        yield vllm, client


@asynccontextmanager
async def listening(vllm: VllmFront) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(vllm.app, port=0, log_level="warning", lifespan="on"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


@pytest.mark.parametrize(("body", "path"), SHAPES)
def test_the_shape_of_a_body_picks_its_path(body: dict[str, Any], path: str) -> None:
    with front() as (vllm, client):
        sent = json.dumps(body, indent=3).encode() + b"  "
        answer = client.post("/predict?a=b", content=sent)
        assert (answer.status_code, answer.json()) == (200, {"path": path, "query": "a=b", "model": "tiny"})
        assert vllm.bodies == [(path, sent)], "byte for byte"


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/json; charset=utf-8", "application/x-www-form-urlencoded"]
)
def test_the_name_of_the_body_does_not_matter(content_type: str) -> None:
    with front() as (_, client):
        answer = client.post("/predict", content=json.dumps(CHAT), headers={"content-type": content_type})
        assert answer.status_code == 200
        direct = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert direct.status_code == 400, "elsewhere vLLM decides"


def test_an_unknown_model_is_vllms_404() -> None:
    with front() as (_, client):
        answer = client.post("/predict", json={**CHAT, "model": "nobody"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
        assert client.post("/predict", json={**CHAT, "model": "tiny"}).status_code == 200
        assert client.post("/predict", json={**CHAT, "model": None}).status_code == 200


def test_keys_are_asked_for_as_on_the_path_it_goes_to() -> None:
    with front(key="k") as (vllm, client):
        for path in ("/predict", "/v1/chat/completions"):
            assert client.post(path, json=CHAT).status_code == 401
            assert client.post(path, json=CHAT, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert client.post(path, json=CHAT, headers={"authorization": "Bearer k"}).status_code == 200
        assert len(vllm.bodies) == 2


@pytest.mark.parametrize("path", ["/invocations", "/invocations/", "/%69nvocations"])
def test_there_are_no_invocations(path: str) -> None:
    with front(key="k") as (vllm, client):
        answer = client.post(path, json={**CHAT, "model": "nobody"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
        assert vllm.bodies == []


@pytest.mark.parametrize("body", [b"", b"x", b"\xff", b"[" * 100_000, b"[]", b'"prompt"', b"null"])
def test_what_is_no_object_is_refused_as_our_own_server_does(body: bytes) -> None:
    with pytest.raises(BadInput) as refused:
        parse(body, "tiny", chat=None)
    with front() as (vllm, client):
        answer = client.post("/predict", content=body)
        assert (answer.status_code, answer.json()) == (refused.value.status, refused.value.body())
        assert vllm.bodies == []


@pytest.mark.parametrize(
    "body", [{}, {**CHAT, "prompt": "hi"}, {"messages": None, "prompt": "hi"}, {"prompt": "", "input": ""}]
)
def test_a_body_has_one_shape(body: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as refused:
        parse(json.dumps(body).encode(), "tiny", chat=None) if "input" not in body else parse(b"{}", "tiny", chat=None)
    with front() as (_, client):
        answer = client.post("/predict", json=body)
        ours = refused.value.body()["error"]
        assert (answer.status_code, {**answer.json()["error"], "message": ""}) == (400, {**ours, "message": ""})
        assert answer.json()["error"]["message"].startswith("give either messages (chat)")


def test_a_body_is_held_up_to_the_limit_of_our_own_server() -> None:
    assert MAX_BODY == own_server.MAX_BODY
    with front() as (vllm, client):
        padding = b" " * (MAX_BODY - len(json.dumps(CHAT)))
        assert client.post("/predict", content=json.dumps(CHAT).encode() + padding).status_code == 200
        answer = client.post("/predict", content=json.dumps(CHAT).encode() + padding + b" ")
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            413,
            f"the body is larger than {MAX_BODY} bytes",
        )
        assert len(vllm.bodies) == 1


async def test_an_endless_body_is_not_read_to_its_end() -> None:
    read, answered = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": bytes(1024 * 1024), "more_body": True}

    async def send(message: Any) -> None:
        answered.append(message)

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": []}
    await Predict(VllmFront(Predict).app)(scope, receive, send)
    assert (read, answered[0]["status"]) == (17, 413)


async def test_a_body_comes_in_pieces() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in json.dumps(CHAT).encode():
            yield bytes([byte])

    vllm = VllmFront(Predict)
    async with listening(vllm) as port, httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"http://127.0.0.1:{port}/predict", content=pieces())
        assert answer.json()["path"] == "/v1/chat/completions"
        assert vllm.bodies == [("/v1/chat/completions", json.dumps(CHAT).encode())]


async def test_answers_are_streamed_through() -> None:
    async with listening(VllmFront(Predict)) as port, httpx.AsyncClient(trust_env=False) as client:
        async with client.stream("POST", f"http://127.0.0.1:{port}/predict", json={**CHAT, "stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines == ["data: 0", "data: 1", "data: 2", "data: [DONE]"]


async def test_vllm_hears_that_a_client_left_while_it_waits() -> None:
    vllm = VllmFront(Predict)
    async with listening(vllm) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({**CHAT, "waits": True}).encode()
        writer.write(b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        while not vllm.bodies:
            await asyncio.sleep(0.01)
        assert not vllm.hung_up.is_set()
        writer.close()
        await asyncio.wait_for(vllm.hung_up.wait(), 30)
        assert await reader.read() == b""


async def test_a_client_that_leaves_within_its_body_is_not_answered() -> None:
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    vllm, answered = VllmFront(Predict), []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        answered.append(message)

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": []}
    await Predict(vllm.app)(scope, receive, send)
    assert (answered, vllm.bodies, messages) == ([], [], [])


def test_all_else_passes() -> None:
    with front() as (vllm, client):
        assert vllm.started, "the lifespan went through"
        assert client.get("/health").status_code == 200
        assert client.get("/predict").status_code == 404
        assert client.post("/v1/completions", json={"messages": 1}).json()["path"] == "/v1/completions"
        with client.websocket_connect("/v1/realtime") as socket:
            socket.send_text("a")
            assert socket.receive_text() == "a"


def test_it_needs_nothing_but_python() -> None:
    tree = ast.parse(Path(predict.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.name for node in imported if isinstance(node, ast.Import) for name in node.names}
    modules |= {str(node.module) for node in imported if isinstance(node, ast.ImportFrom)}
    assert modules and {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names
