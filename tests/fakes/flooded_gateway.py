"""A gateway as a process of its own, with a route that came to it over a real log."""

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx

from mini_studio.bus.kafka import Publisher, create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.records.routes import RouteRecord
from mini_studio.settings import Kafka
from tests.fakes.broker import broker_process, free_port, wait_for
from tests.unit.test_records import DeploymentReady, deployment, follow, status

MODEL = "tiny-llama"


@contextlib.asynccontextmanager
async def gateway(endpoint: str, **settings: str) -> AsyncIterator[str]:
    """The address of one that knows a single route: that all clients share `MODEL`, which answers at `endpoint`."""
    with broker_process() as (bootstrap, _), tempfile.TemporaryDirectory() as data:
        kafka = Kafka(bootstrap=bootstrap)
        await create_topics(kafka)
        asked = deployment("", weights=None)
        record = follow(RouteRecord.of(asked), status(asked, DeploymentReady, 1, endpoints=[endpoint], replicas=1))
        async with Publisher(kafka) as publisher:
            await publisher.publish([outgoing(entry) for entry in record.outbox])
        port = free_port()
        own = {"API__PORT": str(port), "KAFKA__BOOTSTRAP": bootstrap, "LOG__LEVEL": "warning", **settings}
        environment = os.environ | {f"MINI_STUDIO_{name}": value for name, value in own.items()}
        command = [sys.executable, "-m", "mini_studio.cli", "gateway", "--data", str(Path(data))]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        try:
            await asyncio.to_thread(wait_for, port, 60)
            url = f"http://127.0.0.1:{port}"
            async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(60):
                while (await client.get(f"{url}/health")).status_code != 200:
                    await asyncio.sleep(0.05)
            yield url
        finally:
            process.terminate()
            process.wait(30)
