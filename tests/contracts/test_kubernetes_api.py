"""What the client of the Kubernetes API makes of refusals and outages, against a server that answers as told."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from mini_studio.drivers.kubernetes import api as module
from mini_studio.drivers.kubernetes.api import SERVICE, KubeApi
from mini_studio.errors import Conflict, Refused, StudioError, Unavailable
from mini_studio.settings import Kubernetes

MANIFEST = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}


class Server:
    """Answers each request with the next of `answers`: a status, or None for no answer at all."""

    def __init__(self) -> None:
        self.answers: deque[int | None] = deque()
        self.requests: list[web.Request] = []
        self.at_once = self.most_at_once = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        status = self.answers.popleft() if self.answers else 200
        await asyncio.sleep(3 if status is None else 0.02)
        self.at_once -= 1
        body: dict[str, Any] = {"kind": "Status", "message": f"because of {status}"}
        return web.json_response(body if status != 200 else MANIFEST, status=status or 200)


@pytest_asyncio.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Server, KubeApi, Path]]:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    server = Server()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    kubeconfig = tmp_path / "kubeconfig"
    write(kubeconfig, port, "first")
    api = KubeApi(Kubernetes(kubeconfig=kubeconfig, namespace="here", max_requests=3, request_timeout_s=0.5))
    yield server, api, kubeconfig
    await api.aclose()
    await runner.cleanup()


def write(kubeconfig: Path, port: int, token: str) -> None:
    content = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    kubeconfig.write_text(json.dumps(content))


async def test_what_passes_is_tried_again(server: tuple[Server, KubeApi, Path]) -> None:
    told, api, _ = server
    told.answers.extend([429, 503, 500])
    assert await api.apply(SERVICE, MANIFEST, force=True) == MANIFEST
    assert len(told.requests) == 4


async def test_in_the_end_it_is_an_outage(server: tuple[Server, KubeApi, Path]) -> None:
    told, api, _ = server
    told.answers.extend([503] * 10)
    with pytest.raises(Unavailable, match="because of 503"):
        await api.get(SERVICE, "a")
    assert len(told.requests) == module.TRIES


async def test_silence_is_an_outage_in_time(server: tuple[Server, KubeApi, Path]) -> None:
    told, api, _ = server
    told.answers.extend([None] * 10)
    with pytest.raises(Unavailable, match="is away"):
        await asyncio.wait_for(api.get(SERVICE, "a"), 10)


@pytest.mark.parametrize(
    ("status", "error"), [(400, Refused), (403, Refused), (405, Refused), (409, Conflict), (422, Refused)]
)
async def test_a_refusal_is_told(server: tuple[Server, KubeApi, Path], status: int, error: type[StudioError]) -> None:
    told, api, _ = server
    told.answers.extend([status] * 10)
    with pytest.raises(error, match=f"because of {status}"):
        await api.apply(SERVICE, MANIFEST, force=True)
    # a server that was just started has not read the roles yet
    assert len(told.requests) == (module.TRIES if status == 403 else 1)


async def test_what_is_not_there_is_none(server: tuple[Server, KubeApi, Path]) -> None:
    told, api, _ = server
    told.answers.extend([404, 404, 404])
    assert await api.get(SERVICE, "a") is None
    await api.delete(SERVICE, "a", uid="u", version="1")
    with pytest.raises(Refused, match="check that the namespace here exists"):
        await api.apply(SERVICE, MANIFEST, force=True)


async def test_a_token_that_is_refused_is_read_anew(server: tuple[Server, KubeApi, Path]) -> None:
    told, api, kubeconfig = server
    await api.get(SERVICE, "a")
    write(kubeconfig, 1, "second")
    told.answers.append(401)
    assert await api.get(SERVICE, "a") == MANIFEST
    assert [request.headers["Authorization"] for request in told.requests] == ["Bearer first"] * 2 + ["Bearer second"]


async def test_no_more_calls_at_once_than_the_setting_says(server: tuple[Server, KubeApi, Path]) -> None:
    told, api, _ = server
    await asyncio.gather(*(api.get(SERVICE, "a") for _ in range(20)))
    assert told.most_at_once == 3


async def test_no_cluster_says_what_to_do(tmp_path: Path) -> None:
    api = KubeApi(Kubernetes(kubeconfig=tmp_path / "none"))
    with pytest.raises(Unavailable, match="MINI_STUDIO_SERVING__KUBERNETES__KUBECONFIG"):
        await api.get(SERVICE, "a")
