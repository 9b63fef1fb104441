"""The composition root: `open_studio(settings)` builds every part once and hands it down."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_studio.bus.dead_letters import DeadLetters
from mini_studio.bus.kafka import Publisher
from mini_studio.bus.relay import Relay
from mini_studio.drivers.catalogue import ModelCatalogue
from mini_studio.drivers.dfs import DfsStore
from mini_studio.drivers.ports import BlobStore, ServingDriver, TrainingCluster
from mini_studio.ingest import DatasetIntake
from mini_studio.records.datasets import Dataset, DatasetProfile, Datasets
from mini_studio.records.deployments import Deployment, Deployments
from mini_studio.records.idempotency import IdempotencyKey, IdempotencyKeys
from mini_studio.records.jobs import Job
from mini_studio.records.projection import Projections
from mini_studio.records.record import Repository
from mini_studio.records.releases import Release
from mini_studio.records.routes import RouteRecord
from mini_studio.records.shadow import shadow_of
from mini_studio.records.sqlite import SqliteStore
from mini_studio.records.store import Collection, RecordStore
from mini_studio.records.training_runs import TrainingRun
from mini_studio.records.usage import UsageHour, UsageHours
from mini_studio.settings import Settings

if TYPE_CHECKING:
    from mini_studio.drivers.s3 import S3Store

RECORDS = (Dataset, DatasetProfile, Job, TrainingRun, Deployment, Release, RouteRecord, IdempotencyKey, UsageHour)
COLLECTIONS: tuple[Collection, ...] = tuple(record.COLLECTION for record in RECORDS)
SHADOWS: tuple[Collection, ...] = tuple(shadow_of(record.COLLECTION) for record in (Dataset, Job, Deployment))
"""Where a replay builds records anew. Nobody relays these."""

DECIDED_BY: dict[str, tuple[Collection, ...]] = {
    "api": (Dataset.COLLECTION, Job.COLLECTION, Deployment.COLLECTION),
    "datasets": (DatasetProfile.COLLECTION,),
    "training": (TrainingRun.COLLECTION,),
    "serving": (Release.COLLECTION,),
    "jobs": (Deployment.COLLECTION,),
    "routes": (RouteRecord.COLLECTION,),
    "usage": (),
}
"""Whose outboxes each process relays right after its writes; the standalone relay sweeps all of them."""


class Studio:
    """Every part of the studio that a process may need. Drivers are built when they are first asked for."""

    def __init__(self, settings: Settings, relayed: Sequence[Collection] = (), *, sweeper: bool = False) -> None:
        self.settings = settings
        self.store = record_store(settings)
        self.publisher = Publisher(settings.kafka)
        self.dead_letters = DeadLetters(settings.kafka, self.publisher)
        self.relay = Relay(
            self.store, self.publisher, relayed, min_age_s=2.0 if sweeper else 0.0, poll_s=1.0 if sweeper else None
        )
        wake = self.relay.wake
        self.datasets = Datasets(self.store, Dataset, wake)
        self.profiles = Repository(self.store, DatasetProfile, wake)
        self.jobs = Projections(self.store, Job, wake)
        self.runs = Repository(self.store, TrainingRun, wake)
        self.deployments = Deployments(self.store, Deployment, wake)
        self.releases = Repository(self.store, Release, wake)
        self.routes = Repository(self.store, RouteRecord, wake)
        self.keys = IdempotencyKeys(self.store, IdempotencyKey, wake)
        self.usage = UsageHours(self.store, UsageHour)
        self.runs_changed = asyncio.Event()
        """Set when the training reconciler should look now, not at its next turn."""
        self.leaving = False
        """This process is about to end: what only waits should answer now."""
        self.releases_changed = asyncio.Event()

    @cached_property
    def dfs(self) -> BlobStore:
        return DfsStore(self.settings.dfs)

    @cached_property
    def s3(self) -> "S3Store":
        from mini_studio.drivers.s3 import S3Store

        return S3Store(self.settings.s3)

    async def load_s3(self) -> "S3Store":
        """`s3`, whose library takes seconds to load on a busy machine, in which nobody would be answered and no heartbeat would leave."""
        return await asyncio.to_thread(lambda: self.s3)

    @cached_property
    def intake(self) -> DatasetIntake:
        return DatasetIntake(self.dfs, self.s3, self.settings.uploads)

    @cached_property
    def catalogue(self) -> ModelCatalogue:
        return ModelCatalogue(self.settings.models)

    @cached_property
    def cluster(self) -> TrainingCluster:
        from mini_studio.drivers.ray import RayCluster

        training = self.settings.training
        token = training.ray_token.get_secret_value() if training.ray_token else None
        return RayCluster(training.ray_address, timeout_s=training.ray_timeout_s, token=token)

    @cached_property
    def serving(self) -> ServingDriver:
        if self.settings.serving.driver == "kubernetes":
            from mini_studio.drivers.kubernetes.driver import KubernetesDriver

            return KubernetesDriver(self.settings.models, self.settings.serving, self.releases_changed.set)
        from mini_studio.drivers.local_process import LocalProcessDriver

        state_dir = self.settings.data.resolve() / "serving"
        return LocalProcessDriver(
            state_dir, self.settings.models, self.settings.serving, gateways=self.settings.gateways
        )

    async def prepare_buckets(self) -> None:
        """Create the bucket where it is missing."""
        await self.s3.ensure_bucket()

    def broker_epoch(self) -> int:
        return broker_epoch(self.settings)

    async def aclose(self) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.store.aclose)
            stack.push_async_callback(self.publisher.aclose)
            for name in ("s3", "cluster", "serving"):
                part = self.__dict__.get(name)
                if part is not None and hasattr(part, "aclose"):
                    stack.push_async_callback(part.aclose)


def record_store(settings: Settings) -> RecordStore:
    """Where the settings keep the records."""
    records, collections = settings.records, COLLECTIONS + SHADOWS
    if records.mongo_url is None:
        return SqliteStore(settings.record_file, collections, busy_timeout_s=records.busy_timeout_s)
    from mini_studio.records.mongo import MongoStore

    url = records.mongo_url.get_secret_value()
    return MongoStore(url, records.mongo_database, collections, timeout_s=records.busy_timeout_s)


def broker_epoch_file(settings: Settings) -> Path:
    return settings.data / "run" / "broker-epoch"


def broker_epoch(settings: Settings) -> int:
    """Changes when the embedded broker was replaced by an empty one; constant on a broker that keeps its log."""
    try:
        return broker_epoch_file(settings).stat().st_mtime_ns if settings.kafka.refill else 0
    except OSError:
        return 0


async def ended(task: "asyncio.Task[Any]") -> None:
    """Cancel the task until it has ended: a client's start or stop may swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=1)


@asynccontextmanager
async def open_studio(
    settings: Settings, *, relayed: Sequence[Collection] = (), sweeper: bool = False
) -> AsyncIterator[Studio]:
    """A studio whose relay publishes the outboxes of `relayed`; everything is closed at the end."""
    studio = Studio(settings, relayed, sweeper=sweeper)
    relaying = asyncio.create_task(studio.relay.run()) if relayed else None
    try:
        yield studio
    finally:
        if relaying is not None:
            await ended(relaying)
        await studio.aclose()
