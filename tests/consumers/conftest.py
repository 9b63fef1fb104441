"""One consumer at a time, as its process runs it: real broker, real record store, its services beside it.

Ray and the model servers are fakes that pass the same contract suites as the real ones.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from consumers.app import CONSUMERS, run_one
from mini_studio.bus.kafka import create_topics
from mini_studio.bus.relay import Relay
from mini_studio.drivers.dfs import DfsStore
from mini_studio.health import Health
from mini_studio.settings import Kafka, Settings, Training
from mini_studio.wiring import COLLECTIONS, open_studio
from tests.consumers.cases import CASES, World
from tests.fakes.broker import running_broker
from tests.fakes.serving_driver import FakeServingDriver
from tests.fakes.training_cluster import FakeTrainingCluster


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(CASES))
async def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A studio whose one consumer runs."""
    case = CASES[request.param]
    data: Path = tmp_path_factory.mktemp(request.param)
    with running_broker() as bootstrap:
        settings = Settings(
            data=data,
            kafka=Kafka(bootstrap=bootstrap, partitions=1, fetch_wait_ms=20),
            training=Training(max_running=1000, poll_s=0.05),
        )
        await create_topics(settings.kafka)
        async with open_studio(settings, relayed=COLLECTIONS) as studio:
            studio.s3 = DfsStore(data / "s3")  # type: ignore[assignment]
            studio.cluster = FakeTrainingCluster()
            studio.serving = FakeServingDriver()
            health, stop = Health(), asyncio.Event()
            running: asyncio.Task[Any] = asyncio.create_task(run_one(CONSUMERS[case.consumer], studio, health, stop))
            sweeping = asyncio.create_task(Relay(studio.store, studio.publisher, COLLECTIONS, poll_s=0.5).run())
            yield World(studio, case)
            stop.set()
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
