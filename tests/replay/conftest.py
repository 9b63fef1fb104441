"""A studio that has lived: all consumers made its records over a real broker, then they were stopped."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from consumers.app import CONSUMERS, run_one
from consumers.watchers import attempts
from events.datasets import DatasetDeleted
from events.fine_tuning import FineTuneCancelRequested
from events.topics import Plain
from events.types import new_id
from events.usage import TYPE, UsageBatch, UsageRecord
from mini_studio.bus.kafka import Outgoing, create_topics
from mini_studio.drivers.dfs import DfsStore
from mini_studio.health import Health
from mini_studio.records.datasets import Dataset
from mini_studio.records.deployments import removal
from mini_studio.records.jobs import Job
from mini_studio.records.projection import requested
from mini_studio.records.record import ANYONE
from mini_studio.settings import Kafka, Settings, Training
from mini_studio.wiring import COLLECTIONS, Studio, open_studio
from tests.consumers.cases import CAUSE, an_upload, deploy, eventually, fine_tune
from tests.consumers.test_watchers import finishes, says, steps
from tests.fakes.broker import running_broker
from tests.fakes.serving_driver import FakeServingDriver
from tests.fakes.training_cluster import FakeTrainingCluster

SUCCEEDED, RUNNING, CANCELLED, DEPLOYED, REMOVED = 4, 3, 1, 3, 2


@dataclass
class Lived:
    """Its settings, with a data folder of the test's own and the broker that holds its log."""

    settings: Settings
    jobs: int = SUCCEEDED + RUNNING + CANCELLED
    deployments: int = DEPLOYED + REMOVED


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def life(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    data: Path = tmp_path_factory.mktemp("life")
    with running_broker() as bootstrap:
        kafka = Kafka(bootstrap=bootstrap, partitions=2, fetch_wait_ms=20)
        settings = Settings(data=data, kafka=kafka, training=Training(max_running=100, poll_s=0.05))
        await create_topics(kafka)
        async with open_studio(settings, relayed=COLLECTIONS) as studio, consuming(studio):
            await live(studio)
        yield settings


@pytest.fixture
def lived(life: Settings, tmp_path: Path) -> Lived:
    shutil.copytree(life.data, tmp_path / "data")
    return Lived(life.model_copy(update={"data": tmp_path / "data"}))


@contextlib.asynccontextmanager
async def consuming(studio: Studio) -> AsyncIterator[None]:
    """All consumers and their watchers run."""
    studio.s3 = DfsStore(studio.settings.data / "s3")  # type: ignore[assignment]
    studio.cluster, studio.serving = FakeTrainingCluster(), FakeServingDriver()
    stop = asyncio.Event()
    running = [asyncio.create_task(run_one(c, studio, Health(), stop)) for c in CONSUMERS.values()]
    try:
        yield
    finally:
        stop.set()
        await asyncio.gather(*running, return_exceptions=True)


async def live(studio: Studio) -> None:
    """Datasets are profiled, and one is deleted; jobs run, succeed and are cancelled; deployments come, change and go."""
    for envelope in [await an_upload(studio) for _ in range(2)]:
        (uploaded,) = envelope
        await studio.datasets.insert(
            requested(Dataset, uploaded.data, subject=uploaded.subject, client_code="acme", cause=CAUSE)
        )
    deleted = DatasetDeleted(dataset_id=uploaded.subject, dfs_path=uploaded.data.dfs_path, s3_uri=uploaded.data.s3_uri)
    await studio.datasets.change("acme", uploaded.subject, lambda present: present.asking(deleted, CAUSE))
    jobs = [new_id("job") for _ in range(SUCCEEDED + RUNNING + CANCELLED)]
    for id in jobs:
        await studio.jobs.insert(requested(Job, fine_tune(id), subject=id, client_code="acme", cause=CAUSE))
    deployments = [new_id("dep") for _ in range(DEPLOYED + REMOVED)]
    for id in deployments:
        await studio.deployments.request("acme", deploy(id), CAUSE)
    for number, id in enumerate(jobs):
        run = await eventually(lambda id=id: submitted(studio, id))
        says(studio, run, *(steps(n) for n in range(1, 4)))
        if number < SUCCEEDED:
            finishes(studio, run, b"weights")
    for id in deployments[DEPLOYED:]:
        await eventually(status_of(studio, studio.deployments, id, "ready"))
        await studio.deployments.change("acme", id, lambda present: removal(present, CAUSE))
    scaled = deploy(deployments[0]).scale.model_copy(update={"max_replicas": 3})
    await studio.deployments.request("acme", deploy(deployments[0]).model_copy(update={"scale": scaled}), CAUSE)
    for number, id in enumerate(jobs):
        await eventually(status_of(studio, studio.jobs, id, "succeeded" if number < SUCCEEDED else "running"))
    for id in jobs[SUCCEEDED + RUNNING :]:
        unwanted = FineTuneCancelRequested(job_id=id)
        await studio.jobs.change("acme", id, lambda present, event=unwanted: present.asking(event, CAUSE))  # type: ignore[misc]
        await eventually(status_of(studio, studio.jobs, id, "cancelled"))
    for number, id in enumerate(deployments):
        await eventually(status_of(studio, studio.deployments, id, "ready" if number < DEPLOYED else "removed"))
    used = UsageRecord(client_code="acme", model="m", status=200, total_ms=1)
    batch = UsageBatch(type=TYPE, gateway="0" * 16, sequence=1, at=datetime.now(UTC), records=[used])
    await studio.publisher.publish(
        [Outgoing(Plain.USAGE, batch.gateway.encode(), batch.model_dump_json().encode(), [])]
    )
    await eventually(lambda: studio.usage.where("acme"))
    await eventually(lambda: quiet(studio))


async def submitted(studio: Studio, id: str) -> Any:
    run = await studio.runs.get(ANYONE, id)
    return run if run and run.submission_id and attempts.folder(run, studio.settings).exists() else None


def status_of(studio: Studio, records: Any, id: str, status: str) -> Callable[[], Awaitable[bool]]:
    async def has() -> bool:
        found = await records.get(ANYONE, id)
        return found is not None and found.status == status

    return has


async def quiet(studio: Studio) -> bool:
    """Nothing waits in an outbox, and every record and route has all its events."""
    if await studio.store.pending(COLLECTIONS, 1):
        return False
    for records in (studio.jobs, studio.deployments, studio.datasets):
        for record in await records.where(ANYONE):
            last = {envelope.source.value: envelope.sequence for envelope in await records.history(record.id)}
            if record.applied != last:
                return False
    revisions = {d.id: sum(d.applied.values()) for d in await studio.deployments.where(ANYONE)}
    return {route.id: route.revision for route in await studio.routes.where(ANYONE)} == revisions
