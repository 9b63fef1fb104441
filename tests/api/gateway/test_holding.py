"""Requests for a model that sleeps: held, counted, answered when it is awake."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.records.routes import Route
from mini_studio.settings import MIB, Api, Gateway, Kafka, Settings
from tests.api.conftest import served
from tests.api.gateway.conftest import Client
from tests.fakes.broker import free_port
from tests.fakes.upstream import Upstream, upstream
from tests.fakes.waiting import until

INFER = "/inference/infer/m"
HELD = 3


class Model:
    """The shared model `m`, and what the routes say of it."""

    def __init__(self, app: FastAPI, server: Upstream) -> None:
        self.server = server
        self._app = app
        self._revision = 0

    def becomes(self, replicas: int, **changes: Any) -> None:
        self._revision += 1
        route = Route(
            deployment_id="dep_1", name="base-m", client_code="", kind=DeploymentKind.BASE, model="m", base_model="m",
            requested_at="", revision=self._revision,
            **{"status": DeploymentStatus.READY, "endpoints": [self.server.url], "replicas": replicas, **changes},
        )  # fmt: skip
        self._app.state.routes.put("dep_1", route, self._revision)

    def holds(self, requests: int) -> bool:
        return bool(self._app.state.holding._held["dep_1"] == requests)

    def goes(self) -> None:
        self._revision += 1
        self._app.state.routes.put("dep_1", None, self._revision)


def own_app(data: Path, client: Client, *, hold_s: float, max_body_bytes: int = MIB) -> FastAPI:
    kafka, api = Kafka(bootstrap=f"127.0.0.1:{free_port()}"), Api(max_body_bytes=max_body_bytes)
    gateway = Gateway(client=client, hold_requests=HELD, hold_s=hold_s)
    return create_app(Settings(data=data, kafka=kafka, api=api, gateway=gateway))


@pytest.fixture
def app(tmp_path: Path, asked_by: Client) -> FastAPI:
    return own_app(tmp_path, asked_by, hold_s=30)


@pytest.fixture
async def model(app: FastAPI, url: str) -> AsyncIterator[Model]:
    """It sleeps."""
    async with upstream() as server:
        model = Model(app, server)
        model.becomes(0)
        yield model


async def load(client: httpx.AsyncClient) -> float | None:
    """What Prometheus reads; None: there is no such series."""
    lines = (await client.get("/metrics")).text.splitlines()
    found = [line for line in lines if line.startswith('mini_studio_gateway_requests{deployment="base-m"}')]
    return float(found[0].rpartition(" ")[2]) if found else None


async def becomes(client: httpx.AsyncClient, expected: float | None) -> None:
    async with asyncio.timeout(10):
        while await load(client) != expected:
            await asyncio.sleep(0.02)


async def ended(answer: Awaitable[httpx.Response]) -> tuple[int, str, str | None]:
    response = await asyncio.wait_for(answer, 10)
    return response.status_code, response.json().get("error", ""), response.headers.get("Retry-After")


async def test_a_request_waits_until_the_model_is_awake(client: httpx.AsyncClient, model: Model) -> None:
    bodies = [b'{"prompt": "%d"}' % number for number in range(HELD)]
    held = [asyncio.create_task(client.post(INFER, content=body)) for body in bodies]
    await becomes(client, HELD)
    assert model.server.connections == 0
    model.becomes(0, status=DeploymentStatus.DEPLOYED, endpoints=[])
    await asyncio.sleep(0.1)
    assert not any(request.done() for request in held), "it is being started"
    model.becomes(1)
    assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * HELD
    assert sorted(model.server.bodies) == sorted(bodies)
    await becomes(client, None)


async def test_a_request_outlasts_the_moment_in_which_the_last_replica_goes(
    client: httpx.AsyncClient, model: Model
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    model.becomes(1, endpoints=[nobody])
    late = asyncio.create_task(client.post(INFER, content=b"{}"))
    await asyncio.sleep(0.2)
    model.becomes(0, endpoints=[nobody])
    await until(lambda: model.holds(1), 5)
    model.becomes(1, endpoints=[nobody])  # and the first one comes, which not all of the cluster knows at once
    await asyncio.sleep(0.2)
    model.becomes(1)
    assert (await ended(late))[0] == 200
    assert model.server.bodies == [b"{}"]


async def test_a_model_that_stays_away_is_a_bad_gateway(client: httpx.AsyncClient, model: Model) -> None:
    model.becomes(1, endpoints=[f"http://127.0.0.1:{free_port()}"])
    status, error, _ = await ended(client.post(INFER, content=b"{}"))
    assert (status, "deployment base-m cannot be reached" in error) == (502, True)


async def test_more_than_may_wait_are_told_to_come_back(client: httpx.AsyncClient, model: Model) -> None:
    held = [asyncio.create_task(client.post(INFER, content=b"{}")) for _ in range(HELD)]
    await becomes(client, HELD)
    status, error, retry_after = await ended(client.post(INFER, content=b"{}"))
    assert (status, retry_after) == (503, "2")
    assert "requests wait for it" in error
    model.becomes(2)
    assert [(await ended(answer))[0] for answer in held] == [200] * HELD


async def test_a_client_that_hangs_up_frees_its_place(url: str, client: httpx.AsyncClient, model: Model) -> None:
    for body in (b"{}", b""):  # the second one has said that there is more to come
        writers = [await hold(url, body) for _ in range(HELD)]
        await becomes(client, HELD)
        for writer in writers:
            writer.close()
        await becomes(client, None)
    held = asyncio.create_task(client.post(INFER, content=b"{}"))
    await becomes(client, 1)
    model.becomes(1)
    assert (await ended(held))[0] == 200


async def hold(url: str, body: bytes) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
    writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n%s" % (INFER.encode(), body))
    await writer.drain()
    return writer


async def test_a_waiting_request_is_not_read_into_memory(tmp_path: Path, asked_by: Client) -> None:
    body = b"x" * (64 * 1024 * 1024)  # more than the sockets between them keep
    app = own_app(tmp_path, asked_by, hold_s=30, max_body_bytes=len(body))
    async with served(app) as url, upstream() as server, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        model = Model(app, server)
        model.becomes(0)
        sent = 0

        async def pieces() -> AsyncIterator[bytes]:
            nonlocal sent
            for start in range(0, len(body), 65536):
                yield body[start : start + 65536]
                sent += 65536

        headers = {"Content-Length": str(len(body))}
        held = asyncio.create_task(client.post(INFER, content=pieces(), headers=headers, timeout=30))
        await until(lambda: app.state.holding._held["dep_1"], 5)
        await asyncio.sleep(0.5)
        assert sent < len(body) / 2
        model.becomes(1)
        assert (await held).status_code == 200
        assert model.server.bodies == [body]


async def test_a_model_that_does_not_wake_in_time(tmp_path: Path, asked_by: Client) -> None:
    app = own_app(tmp_path, asked_by, hold_s=0.3)
    async with served(app) as url, upstream() as server, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        Model(app, server).becomes(0)
        status, error, retry_after = await ended(client.post(INFER, content=b"{}"))
        assert (status, retry_after) == (503, "2")
        assert "not awake yet" in error
        assert not app.state.holding._held


async def test_a_model_that_fails_or_goes_keeps_nobody_waiting(client: httpx.AsyncClient, model: Model) -> None:
    held = asyncio.create_task(client.post(INFER, content=b"{}"))
    await becomes(client, 1)
    model.becomes(0, status=DeploymentStatus.FAILED, endpoints=[], message="no GPU is left")
    assert (await ended(held))[:2] == (503, "deployment base-m failed: no GPU is left")
    model.becomes(0)
    held = asyncio.create_task(client.post(INFER, content=b"{}"))
    await becomes(client, 1)
    model.goes()
    assert (await ended(held))[:2] == (404, "deployment base-m was removed")


async def test_nobody_waits_at_a_process_that_ends(app: FastAPI, client: httpx.AsyncClient, model: Model) -> None:
    held = asyncio.create_task(client.post(INFER, content=b"{}"))
    await becomes(client, 1)
    app.state.leave()
    assert (await ended(held))[0] == 503
    assert (await ended(client.post(INFER, content=b"{}")))[0] == 503


async def test_a_model_that_starts_for_the_first_time_is_not_waited_for(
    client: httpx.AsyncClient, model: Model
) -> None:
    model.becomes(0, status=DeploymentStatus.DEPLOYED, endpoints=[])
    status, error, retry_after = await ended(client.post(INFER, content=b"{}"))
    assert (status, retry_after) == (503, "2")
    assert "not ready yet" in error


async def test_a_request_counts_until_its_answer_ends(url: str, client: httpx.AsyncClient, model: Model) -> None:
    model.becomes(1)
    model.server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"
    writers = [await hold(url, b"{}") for _ in range(2)]
    await becomes(client, 2)
    writers[0].close()
    await becomes(client, 1)
    writers[1].close()
    await becomes(client, None)


async def test_a_model_that_sleeps_without_an_address_is_woken_and_asked_where_it_then_is(
    client: httpx.AsyncClient, model: Model, app: FastAPI
) -> None:
    woken: list[str] = []
    app.state.holding._wake = lambda route: woken.append(route.name)
    model.becomes(0, endpoints=[])
    held = asyncio.create_task(client.post(INFER, content=b"{}"))
    await becomes(client, 1)
    await until(lambda: woken == ["base-m"], 5)
    await until(lambda: len(woken) == 2, 20)
    model.becomes(1)
    assert (await ended(held))[0] == 200
