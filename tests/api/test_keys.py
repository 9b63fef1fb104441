"""API keys: nobody gets in without one, and whoever has one is that client everywhere."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from api.app import create_app
from api.gateway.app import create_gateway
from api.gateway.identity import Identity, digest, new_key
from api.requests import OPEN_PATHS
from mini_studio.errors import BadRequest, NotFound, Unauthorized
from mini_studio.settings import Api, Settings
from tests.api.conftest import served

ACME, OTHER, ROOT, SECOND = new_key(), new_key(), new_key(), new_key()
KEYS = {"acme": [digest(ACME), digest(SECOND)], "other": digest(OTHER), "*": digest(ROOT)}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    api = Api.model_validate({**settings.api.model_dump(exclude={"keys"}), "keys": KEYS})
    return settings.model_copy(update={"api": api})


async def test_every_endpoint_needs_a_key(app: FastAPI, client: httpx.AsyncClient) -> None:
    tried = 0
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            answer = await client.request(method, re.sub(r"\{\w+\}", "x", path))
            if path in OPEN_PATHS or path.startswith("/admin/"):
                assert answer.status_code != 401
                continue
            tried += 1
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["x-request-id"]
            if path.startswith("/v1/"):
                assert answer.json()["error"]["code"] == "invalid_api_key"
            else:
                assert (answer.json()["ok"], answer.json()["code"]) == (False, "unauthorized")
    assert tried >= 10


@pytest.mark.parametrize(
    "path",
    [
        "/nothing", "/v1/models", "/admin", "//health", "/health/", "/health;x", "/%2e/health", "/HEALTH", "/docs/x",
        "/inference/../health", "/inference/deployments?/health", "/inference%2Fdeployments", "/x/admin/",
    ],
)  # fmt: skip
async def test_nor_is_there_a_way_around_by_the_path(url: str, path: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
    assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
    writer.close()


async def test_under_v1_it_is_openais_error(client: httpx.AsyncClient) -> None:
    refused = await client.get("/v1/models", headers=bearer("sk-of-another-place"))
    assert refused.status_code == 401
    assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
    assert refused.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "headers",
    [
        [("Authorization", f"Bearer {ACME}x")],
        [("Authorization", f"Basic {ACME}")],
        [("Authorization", ACME)],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer é".encode("latin-1"))],
        [("Authorization", f"Bearer {digest(ACME)}")],
        [("Authorization", f"Bearer {'x' * 30_000}")],
        [("X-API-Key", ACME)],
    ],
)
async def test_what_is_no_key_is_refused(client: httpx.AsyncClient, headers: list[tuple[str, str]]) -> None:
    answer = await client.get("/inference/deployments", headers=headers)
    assert answer.status_code == 401
    assert ACME not in answer.text


async def test_a_key_is_its_client_everywhere(client: httpx.AsyncClient) -> None:
    for key in (ACME, SECOND):
        for same in ({}, {"X-User-ID": "acme"}, {"OpenAI-Organization": "acme"}):
            own = await client.get("/fine_tuning/jobs/client/acme", headers=bearer(key) | same)
            assert own.status_code == 200
    for another in ({"X-User-ID": "other"}, {"OpenAI-Organization": "other"}, {"X-User-ID": ""}):
        assert (await client.get("/inference/deployments", headers=bearer(ACME) | another)).status_code == 404
    assert (await client.get("/fine_tuning/jobs/client/other", headers=bearer(ACME))).status_code == 404
    assert (await client.get("/inference/deployments?client_code=other", headers=bearer(ACME))).status_code == 404
    asked = {"model_id": "facebook/opt-125m", "client_code": "other"}
    assert (await client.post("/inference/deploy/base", headers=bearer(ACME), json=asked)).status_code == 404
    shared = await client.post("/inference/deploy/base", headers=bearer(ACME), json=asked | {"client_code": ""})
    assert shared.status_code == 404, "what all share is the operator's"


async def test_the_operator_names_whom_it_likes(client: httpx.AsyncClient) -> None:
    for named in ("acme", "other", "new"):
        found = await client.get(f"/fine_tuning/jobs/client/{named}", headers=bearer(ROOT))
        assert found.status_code == 200
        as_acme = await client.get(f"/fine_tuning/jobs/client/{named}", headers=bearer(ROOT) | {"X-User-ID": "acme"})
        assert as_acme.status_code == (200 if named == "acme" else 404)


async def test_a_header_that_is_there_twice_decides_nothing(client: httpx.AsyncClient) -> None:
    for name, value in (("X-User-ID", "acme"), ("Authorization", f"Bearer {ACME}"), ("OpenAI-Organization", "acme")):
        twice = [*bearer(ACME).items(), (name, value)] + ([(name, value)] if name != "Authorization" else [])
        assert (await client.get("/inference/deployments", headers=twice)).status_code == 400


@pytest.fixture
async def gateway_url(settings: Settings) -> AsyncIterator[str]:
    async with served(create_gateway(settings)) as address:
        yield address


async def test_a_gateway_wants_it_too(gateway_url: str) -> None:
    async with httpx.AsyncClient(base_url=gateway_url, trust_env=False, timeout=10) as client:
        assert (await client.post("/inference/infer/m", content=b"{}")).status_code == 401
        assert (await client.post("/inference/infer/m", content=b"{}", headers=bearer(ACME))).status_code == 503
        assert (await client.get("/health")).status_code == 503


async def test_without_keys_nothing_changes(tmp_path: Path, settings: Settings) -> None:
    app = create_app(settings.model_copy(update={"api": Api(), "data": tmp_path / "other"}))
    async with served(app) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer anything"}, {"X-User-ID": "acme"}):
            assert (await client.get("/inference/deployments", headers=headers)).status_code == 200


def test_who_a_key_is() -> None:
    who = Identity(Settings(api=Api.model_validate({"keys": KEYS})))
    for _ in range(2):
        assert who.client(f"Bearer {ACME}", None) == who.client(f"bearer  {ACME}", "acme") == "acme"
        assert (who.client(f"Bearer {ROOT}", None), who.client(f"Bearer {ROOT}", "new")) == (None, "new")
        with pytest.raises(NotFound):
            who.client(f"Bearer {ACME}", "other")
        for wrong in (None, "", f"Bearer {ACME[:-1]}", "Bearer *"):
            with pytest.raises(Unauthorized):
                who.client(wrong, None)
    with pytest.raises(BadRequest):
        who.headers([(b"authorization", b"Bearer " + ROOT.encode()), (b"x-user-id", b"a"), (b"x-user-id", b"b")])
    assert Identity(Settings()).client("Bearer x", "acme") == "acme"


def test_only_keys_that_are_valid_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.gateway.identity.REMEMBERED", 5)
    who = Identity(Settings(api=Api.model_validate({"keys": KEYS})))
    for spaces in range(1, 30):
        assert who.client("Bearer" + " " * spaces + ACME, None) == "acme"
        with pytest.raises(Unauthorized):
            who.client("Bearer" + " " * spaces + "x", None)
    assert 0 < len(who._remembered) <= 5
    assert set(who._remembered.values()) == {"acme"}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"acme": ACME}, "not the key itself"),
        ({"acme": []}, "acme needs the SHA-256"),
        ({"acme corp": digest(ACME)}, "is no client code"),
        ({"": digest(ACME)}, "is no client code"),
        ({"acme": digest(ACME), "other": [digest(OTHER), digest(ACME).upper()]}, "there twice"),
    ],
)
def test_settings_that_are_wrong_say_how_to_make_a_key(keys: object, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Api.model_validate({"keys": keys})
    message = refused.value.errors()[0]["msg"]
    assert says in message
    assert "mini-studio keys new" in message
    assert ACME not in message


def test_a_key_is_made_and_its_setting_told(tmp_path: Path) -> None:
    def run(client: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mini_studio.cli", "keys", "new", client, "--data", str(tmp_path)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MINI_STUDIO_")}
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=60, check=False)

    first = run("acme").stdout.splitlines()
    assert re.fullmatch(r"ms-[A-Za-z0-9_-]{43}", first[0])
    name, _, value = first[-1].partition("=")
    second = run("acme", **{name: value.strip("'")}).stdout.splitlines()
    api = Api(keys=json.loads(second[-1].partition("=")[2].strip("'")))
    who = Identity(Settings(api=api))
    assert who.client(f"Bearer {first[0]}", None) == who.client(f"Bearer {second[0]}", None) == "acme"
    assert run("no client").returncode == 2
