"""`mini-studio gateway` as its own process: routes from a real log, no record store."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mini_studio.bus.kafka import Publisher, create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.records.routes import RouteRecord
from mini_studio.settings import Kafka
from tests.fakes.broker import broker_process, free_port, wait_for
from tests.fakes.upstream import upstream
from tests.unit.test_records import DeploymentReady, deployment, follow, status

BROKER = free_port()


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The gateway's address. Its data folder is a file: nothing can be kept there."""
    port, data = free_port(), tmp_path / "data"
    data.write_text("no folder")
    settings = {
        "MINI_STUDIO_API__PORT": str(port),
        "MINI_STUDIO_KAFKA__BOOTSTRAP": f"127.0.0.1:{BROKER}",
        "MINI_STUDIO_KAFKA__FETCH_WAIT_MS": "20",
    }
    command = [sys.executable, "-m", "mini_studio.cli", "gateway", "--data", str(data)]
    process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


async def test_it_serves_from_the_log_alone(url: str) -> None:
    asked = deployment("", weights=None)
    async with upstream() as model, httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
        early = await client.get("/health")
        assert (early.status_code, early.json()["status"]) == (503, "starting"), "there is no broker yet"
        assert (await client.post("/inference/infer/tiny-llama", content=b"{}")).status_code == 503

        with broker_process(BROKER) as (bootstrap, _):
            settings = Kafka(bootstrap=bootstrap)
            await create_topics(settings)
            answering = status(asked, DeploymentReady, 1, endpoints=[model.url], replicas=1)
            record = follow(RouteRecord.of(asked), answering)
            async with Publisher(settings) as publisher:
                await publisher.publish([outgoing(entry) for entry in record.outbox])

            async with asyncio.timeout(20):
                while (await client.get("/health")).json()["status"] != "ok":
                    await asyncio.sleep(0.1)
            answer = await client.post("/inference/infer/tiny-llama", content=b'{"prompt": "x"}')
            assert (answer.status_code, model.bodies) == (200, [b'{"prompt": "x"}'])
        assert (await client.post("/inference/infer/tiny-llama", content=b"{}")).status_code == 200, "and without one"


async def test_it_has_nothing_else(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10) as client:
        assert "mini_studio_gateway_requests" in (await client.get("/metrics")).text
        assert (await client.get("/")).json()["message"] == "Mini Studio gateway"
        for path in ("/inference/deployments", "/fine_tuning/cluster-status", "/admin/dead-letters", "/docs"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["ok"]) == (404, False)
        assert (await client.post("/inference/deploy/base", json={"model_id": "m"})).status_code == 404
