"""How long a deploy waits, and for what. There is a broker, and nobody serves anything: no first status ever comes."""

import asyncio
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from mini_studio.bus.kafka import create_topics
from mini_studio.settings import Api, Kafka, Settings
from mini_studio.wiring import Studio
from tests.api.test_deploying import BASE, deploy_base
from tests.fakes.broker import broker_process

BODY = {"model_id": "tiny-llama"}
WAIT_S = 5.0


@pytest.fixture
def broker() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with broker_process() as running:
        yield running


@pytest.fixture
async def settings(tmp_path: Path, broker: tuple[str, subprocess.Popen[bytes]]) -> Settings:
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=broker[0]), api=Api(deploy_wait_s=WAIT_S))
    await create_topics(settings.kafka)
    return settings


@pytest.fixture
async def client(app: FastAPI, client: httpx.AsyncClient) -> httpx.AsyncClient:
    """One whose studio has found the broker."""
    async with asyncio.timeout(10):
        while app.state.feed.problem or not app.state.routes.loaded:
            await asyncio.sleep(0.02)
    return client


async def deploy(client: httpx.AsyncClient) -> tuple[int, float]:
    """Status, and the seconds that it took."""
    asked = time.monotonic()
    answered = await client.post("/inference/deploy/base", json=BODY)
    return answered.status_code, time.monotonic() - asked


async def test_a_deploy_whose_event_left_waits_for_its_first_status(client: httpx.AsyncClient) -> None:
    status, seconds = await deploy(client)
    assert status == 202
    assert seconds > WAIT_S


async def test_a_deploy_waits_two_seconds_at_most_for_a_broker_that_keeps_silent(
    client: httpx.AsyncClient, broker: tuple[str, subprocess.Popen[bytes]]
) -> None:
    broker[1].send_signal(signal.SIGSTOP)
    status, seconds = await deploy(client)
    assert status == 202
    assert seconds < 2.2
    assert (await client.get("/health")).json()["status"] == "degraded"


async def test_a_deploy_whose_event_stays_in_the_outbox_waits_two_seconds_at_most(
    client: httpx.AsyncClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the broker answers fetches and takes nothing."""
    monkeypatch.setattr(studio.publisher, "publish", lambda records: asyncio.sleep(60))
    status, seconds = await deploy(client)
    assert status == 202
    assert 1 < seconds < 2.2


async def test_a_deploy_does_not_wait_for_a_broker_that_is_known_to_be_away(
    client: httpx.AsyncClient, studio: Studio, broker: tuple[str, subprocess.Popen[bytes]]
) -> None:
    broker[1].kill()
    await deploy(client)
    async with asyncio.timeout(10):
        while not studio.relay.problem:
            await asyncio.sleep(0.02)
    status, seconds = await deploy(client)
    assert status == 202
    assert seconds < 1


async def test_a_deploy_that_is_removed_while_it_waits_is_a_conflict(client: httpx.AsyncClient) -> None:
    body = {"model_id": "tiny-llama"}
    waiting = asyncio.create_task(client.post("/inference/deploy/base", json=body))
    while (await client.delete(BASE)).status_code != 202:
        await asyncio.sleep(0.02)
    answered = await waiting
    assert (answered.status_code, "remov" in answered.json()["error"]) == (409, True)


async def test_a_deploy_that_another_one_overtakes_is_a_conflict(client: httpx.AsyncClient) -> None:
    body = {"model_id": "tiny-llama"}
    waiting = asyncio.create_task(client.post("/inference/deploy/base", json=body))
    while (await client.get(BASE)).status_code != 200:
        await asyncio.sleep(0.02)
    await deploy_base(client, max_replicas=3)
    assert (await waiting).status_code == 409
