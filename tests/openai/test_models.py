"""`/v1/models`, who asks, and the shape of every failure."""

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import openai
import pytest
from fastapi import FastAPI

from api.openai.errors import openai_error
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.records.routes import Route
from tests.openai.conftest import ask, client_for

OPT = "facebook/opt-125m"


def route(id: str, model: str, client: str = "", **fields: Any) -> Route:
    return Route(
        deployment_id=id,
        name=id,
        client_code=client,
        kind=DeploymentKind.FINE_TUNED if client else DeploymentKind.BASE,
        model=model,
        **{
            "base_model": model,
            "status": DeploymentStatus.READY,
            "endpoints": ["http://127.0.0.1:9"],
            "requested_at": "2026-01-01T00:00:00.000000Z",
            "revision": 1,
            **fields,
        },
    )


@pytest.fixture
def routes(app: FastAPI, url: str) -> None:
    table = app.state.routes
    table.loaded = True
    for each in (
        route("a", OPT),
        route("b", "asleep", replicas=0),
        route("c", "failed", status=DeploymentStatus.FAILED),
        route("d", "starting", status=DeploymentStatus.DEPLOYED, endpoints=[]),
        route("e", "ft:tiny-llama:acme:x-1", "acme", base_model="tiny-llama"),
        route("f", "ft:tiny-llama:rival:y-2", "rival", base_model="tiny-llama"),
    ):
        table.put(each.key, each, 1)


@pytest.mark.usefixtures("routes")
async def test_the_list_is_what_the_caller_can_ask_now(url: str) -> None:
    acme = (await ask(client_for(url).models.list)).data
    assert [model.id for model in acme] == ["asleep", OPT, "ft:tiny-llama:acme:x-1", "tiny-llama"]
    assert [model.owned_by for model in acme] == ["mini-studio", "mini-studio", "acme", "acme"]
    assert {model.created for model in acme} == {1767225600}
    assert [model.id for model in (await ask(client_for(url, None).models.list)).data] == ["asleep", OPT]


@pytest.mark.usefixtures("routes")
async def test_a_model_is_found_by_a_name_with_a_slash_and_not_by_another_client(url: str) -> None:
    client = client_for(url)
    assert (await ask(lambda: client.models.retrieve(OPT))).id == OPT
    for name in ("starting", "failed", "ft:tiny-llama:rival:y-2", "../etc", "none"):
        with pytest.raises(openai.NotFoundError) as missing:
            await ask(lambda name=name: client.models.retrieve(name))  # type: ignore[misc]
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        assert missing.value.request_id


@pytest.mark.usefixtures("routes")
async def test_only_an_own_fine_tuned_model_can_be_deleted(url: str) -> None:
    for organization, name in (("acme", OPT), ("acme", "tiny-llama"), ("acme", "ft:tiny-llama:rival:y-2")):
        with pytest.raises(openai.NotFoundError):
            await ask(lambda o=organization, n=name: client_for(url, o).models.delete(n))  # type: ignore[misc]


async def test_routes_that_are_still_being_read_are_tried_again(url: str, app: FastAPI) -> None:
    with pytest.raises(openai.InternalServerError) as away:
        await ask(client_for(url).models.list)
    assert (away.value.status_code, away.value.type) == (503, "server_error")
    waiting = asyncio.create_task(ask(client_for(url, max_retries=3).models.list))
    app.state.routes.loaded = True
    assert (await waiting).data == []


WHO: list[dict[str, Any]] = [
    {"headers": {"OpenAI-Organization": "acme"}},
    {"headers": {"X-User-ID": "acme"}},
    {"params": {"client_code": "acme"}},
    {"headers": {"X-User-ID": "acme", "OpenAI-Organization": "acme"}, "params": {"client_code": "acme"}},
]


@pytest.mark.usefixtures("routes")
async def test_the_client_is_named_in_any_of_the_ways(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        for named in WHO:
            assert (await http.get("/v1/models/tiny-llama", **named)).status_code == 200, named
            assert (await http.get("/v1/files", **named)).status_code == 200, named
        form = {"purpose": "fine-tune", "client_code": "acme"}
        file = {"file": ("x", b'{"prompt": "a", "completion": "b"}\n')}
        made = (await http.post("/v1/files", data=form, files=file)).json()["id"]
        body = {"model": "tiny-llama", "training_file": made}
        assert (await http.post("/v1/fine_tuning/jobs", json={**body, "client_code": "acme"})).status_code == 200

        for refused in (
            await http.get("/v1/files"),
            await http.post("/v1/fine_tuning/jobs", json=body),
            await http.post("/v1/files", data={"purpose": "fine-tune"}, files=file),
        ):
            assert refused.status_code == 400
            assert "OpenAI-Organization" in refused.json()["error"]["message"]


async def test_who_names_two_clients_or_none_that_can_be_is_refused(url: str) -> None:
    rival = {"OpenAI-Organization": "rival"}
    form = {"purpose": "fine-tune", "client_code": "acme"}
    file = {"file": ("x", b'{"prompt": "a", "completion": "b"}\n')}
    job = {"model": "tiny-llama", "training_file": "x", "client_code": "acme"}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        for refused in (
            await http.get("/v1/files", headers={**rival, "X-User-ID": "acme"}),
            await http.get("/v1/models", headers=rival, params={"client_code": "acme"}),
            await http.post("/v1/files", headers=rival, data=form, files=file),
            await http.post("/v1/fine_tuning/jobs", headers=rival, json=job),
        ):
            assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
            assert "more than one client" in refused.json()["error"]["message"]
        for bad in ("a b", "../x", "x" * 64):
            for where in ({"headers": {"OpenAI-Organization": bad}}, {"params": {"client_code": bad}}):
                assert (await http.get("/v1/files", **where)).status_code == 400
            assert (await http.post("/v1/files", data={**form, "client_code": bad}, files=file)).status_code == 400


FAILURES: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/v1/nowhere", {}, 404),
    ("GET", "/v1/", {}, 404),
    ("PATCH", "/v1/models", {}, 405),
    ("POST", "/v1/fine_tuning/jobs", {"content": b"{"}, 400),
    ("POST", "/v1/fine_tuning/jobs", {"content": b" " * 2_000_000}, 413),
    ("GET", "/v1/files?limit=0", {}, 400),
    ("GET", "/v1/files?limit=10001", {}, 400),
    ("GET", "/v1/files/ds_none", {}, 404),
    ("GET", "/v1/fine_tuning/jobs/none", {}, 404),
    ("GET", "/v1/fine_tuning/jobs?after=none", {}, 400),
]


@pytest.mark.parametrize(("method", "path", "options", "status"), FAILURES)
async def test_every_failure_has_openais_shape(
    url: str, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    head = {"X-User-ID": "acme", "X-Request-ID": "mine", "Content-Type": "application/json"}
    async with httpx.AsyncClient(base_url=url, trust_env=False, headers=head) as http:
        answer = await http.request(method, path, **options)
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


async def test_other_paths_keep_their_own_shape(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        assert (await http.get("/v1nowhere")).json()["ok"] is False


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_type_follows_from_the_status(status: int, kind: str) -> None:
    assert openai_error(status, "m", "c", "p") == {"error": {"message": "m", "type": kind, "param": "p", "code": "c"}}


class Busy(BaseHTTPRequestHandler):
    """Answers 429, then 503, then as it should."""

    said: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        status = (429, 503, 200)[min(len(self.said), 2)]
        self.said.append(status)
        failed = openai_error(status, "later", "rate_limit_exceeded")
        body = json.dumps({"object": "list", "data": []} if status == 200 else failed).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms" if status == 429 else "retry-after", "1")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_the_package_reads_our_failures_and_tries_again() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = client_for(f"http://127.0.0.1:{server.server_port}", max_retries=2)
        assert client.models.list().data == []
        assert Busy.said == [429, 503, 200]
        Busy.said.clear()
        with pytest.raises(openai.RateLimitError) as limited:
            client.with_options(max_retries=0).models.list()
        server.shutdown()
    assert (limited.value.type, limited.value.code) == ("rate_limit_error", "rate_limit_exceeded")
