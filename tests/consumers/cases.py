"""What each consumer is given, and what it has to make of it."""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from events.base import Cause, Envelope, Event
from events.datasets import DatasetDeleted, DatasetUploaded
from events.deployments import DeploymentReady, DeployRequested, Scale
from events.fine_tuning import DatasetRef, FineTuneCancelRequested, FineTuneRequested, FineTuneStarted, Hyperparameters
from events.topics import Topic
from events.types import DatasetFormat, DeploymentKind, new_id
from mini_studio.bus.relay import outgoing
from mini_studio.errors import Unavailable
from mini_studio.records.jobs import Job
from mini_studio.records.projection import requested
from mini_studio.records.record import ANYONE
from mini_studio.records.store import Collection
from mini_studio.records.training_runs import RunPhase
from mini_studio.wiring import Studio

CAUSE = Cause(correlation_id="a-request")
Given = Callable[[Studio], Awaitable[list[Envelope[Any]]]]
Outcome = Callable[[Studio, str], Awaitable[dict[str, Any] | None]]


@dataclass
class Case:
    """One consumer's work on one aggregate."""

    consumer: str
    topic: Topic
    given: Given
    """The events of a fresh aggregate."""
    outcome: Outcome
    """What the consumer made of them; None while it is not done."""
    decides: list[str]
    """Types of the events that the consumer answers with, in order."""
    effect: tuple[str, str]
    """Method and collection of the write after which a crash is played."""
    name: str = ""
    """Default: the consumer's."""


@dataclass
class World:
    studio: Studio
    case: Case

    async def publish(self, envelopes: list[Envelope[Any]]) -> None:
        """As the relay does it: journal first."""
        entries = [envelope.stored() for envelope in envelopes]
        await self.studio.store.journal(entries)
        await self.studio.publisher.publish([outgoing(entry) for entry in entries])

    async def settled(self, subject: str) -> dict[str, Any]:
        """What the consumer made of the aggregate, once it is done."""
        return await eventually(lambda: self.case.outcome(self.studio, subject))

    async def decided(self, subject: str) -> list[tuple[str, int]]:
        """Type and sequence of every event that the consumer answered with, in journal order."""
        entries = await self.studio.store.read_journal(key=subject)
        headers = [entry.stored["headers"] for entry in entries]
        mine = f"/mini-studio/{self.case.consumer}"
        return [(h["ce_type"], int(h["ce_sequence"])) for h in headers if h["ce_source"] == mine]

    def expected(self) -> list[tuple[str, int]]:
        return [(type_, number) for number, type_ in enumerate(self.case.decides, start=1)]


async def eventually(look: Callable[[], Awaitable[Any]], seconds: float = 40) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := await look()):
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.02)
    return found


def envelope(event: Event, subject: str, sequence: int = 1) -> Envelope[Any]:
    return Envelope.of(event, subject=subject, sequence=sequence, client_code="acme", cause=CAUSE)


async def an_upload(studio: Studio) -> list[Envelope[Any]]:
    id = new_id("ds")
    key, content = f"datasets/{id}.jsonl", b'{"prompt": "a", "completion": "b"}\n'
    for store in (studio.dfs, studio.s3):
        async with store.writer(key) as blob:
            await blob.write(content)
    event = DatasetUploaded(
        dataset_id=id, filename="x", dfs_path=studio.dfs.location(key), s3_uri=f"s3://bucket/{key}",
        size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest(), format=DatasetFormat.PROMPT_COMPLETION,
        rows=1, characters=2, longest_line_bytes=len(content),
    )  # fmt: skip
    return [envelope(event, id)]


async def a_deleted_upload(studio: Studio) -> list[Envelope[Any]]:
    (uploaded,) = await an_upload(studio)
    event = uploaded.data
    deleted = DatasetDeleted(dataset_id=event.dataset_id, dfs_path=event.dfs_path, s3_uri=event.s3_uri)
    return [uploaded, envelope(deleted, uploaded.subject, 2)]


def fine_tune(id: str) -> FineTuneRequested:
    return FineTuneRequested(
        job_id=id,
        base_model="tiny-llama",
        fine_tuned_model=f"ft:tiny-llama:acme:{id[-8:]}",
        dataset=DatasetRef(id=new_id("ds"), dfs_path="/d", sha256="0" * 64, rows=1),
        hyperparameters=Hyperparameters(
            n_epochs=1, batch_size=1, learning_rate_multiplier=0.1, prompt_loss_weight=0, seed=0, method="full"
        ),
    )


def a_requested_job() -> Job:
    """A new job's record with its event in the outbox, as a submission writes it."""
    id = new_id("job")
    return requested(Job, fine_tune(id), subject=id, client_code="acme", cause=CAUSE)


async def a_fine_tune(studio: Studio) -> list[Envelope[Any]]:
    id = new_id("job")
    return [envelope(fine_tune(id), id)]


async def a_cancelled_fine_tune(studio: Studio) -> list[Envelope[Any]]:
    id = new_id("job")
    return [envelope(fine_tune(id), id), envelope(FineTuneCancelRequested(job_id=id), id, 2)]


async def a_started_fine_tune(studio: Studio) -> list[Envelope[Any]]:
    id = new_id("job")
    started = FineTuneStarted(job_id=id, attempt=1, submission_id=f"{id}-1")
    return [envelope(fine_tune(id), id), envelope(started, id)]


def deploy(id: str) -> DeployRequested:
    scale = Scale(gpu_count=0, min_replicas=1, max_replicas=1, prometheus_threshold=5)
    name = f"vllm-base-{id[-12:]}"
    return DeployRequested(
        deployment_id=id, generation=1, name=name, kind=DeploymentKind.BASE, model="m", base_model="m", scale=scale
    )


async def a_deployment(studio: Studio) -> list[Envelope[Any]]:
    id = new_id("dep")
    return [envelope(deploy(id), id)]


async def a_ready_deployment(studio: Studio) -> list[Envelope[Any]]:
    id = new_id("dep")
    name = deploy(id).name
    ready = DeploymentReady(deployment_id=id, generation=1, name=name, endpoints=["http://127.0.0.1:9"], replicas=1)
    return [envelope(deploy(id), id), envelope(ready, id)]


async def profiled(studio: Studio, id: str) -> dict[str, Any] | None:
    found = await studio.datasets.get("acme", id)
    return found.model_dump(exclude={"outbox"}) if found and found.state == "verified" else None


async def removed(studio: Studio, id: str) -> dict[str, Any] | None:
    found, profile = await studio.datasets.get("acme", id), await studio.profiles.get("acme", id)
    if found is None or not found.deleted or profile is None or not profile.removed:
        return None
    left = [key for store in (studio.dfs, studio.s3) async for key, _, _ in store.list(f"datasets/{id}")]
    return {"state": found.state, "left": left, "version": profile.version}


async def cancelled(studio: Studio, id: str) -> dict[str, Any] | None:
    run = await studio.runs.get("acme", id)
    if run is None or run.phase is not RunPhase.CANCELLED:
        return None
    trainers = studio.cluster.runs  # type: ignore[attr-defined]
    return {
        "run": run.phase,
        "trains": [name for name, held in trainers.items() if name.startswith(id) and held.state == "running"],
    }


async def submitted(studio: Studio, id: str) -> dict[str, Any] | None:
    found = await studio.runs.get("acme", id)
    runs = studio.cluster.runs  # type: ignore[attr-defined]
    return {"submitted": [name for name in runs if name.startswith(id)]} if found and f"{id}-1" in runs else None


async def job_runs(studio: Studio, id: str) -> dict[str, Any] | None:
    found = await studio.jobs.get("acme", id)
    return found.model_dump(exclude={"outbox"}) if found and found.status == "running" else None


async def served(studio: Studio, id: str) -> dict[str, Any] | None:
    found = await studio.releases.get(ANYONE, id)
    releases = studio.serving.releases  # type: ignore[attr-defined]
    names = [name for name, held in releases.items() if held.spec.deployment_id == id]
    return {"served": names} if found and found.status == "ready" and not found.outbox else None


async def routed(studio: Studio, id: str) -> dict[str, Any] | None:
    found, route = await studio.deployments.get("acme", id), await studio.routes.get("acme", id)
    if found is None or found.status != "ready" or route is None or not route.route or route.outbox:
        return None
    return {"deployment": found.model_dump(exclude={"outbox"}), "endpoints": route.route.endpoints}


def insert(collection: str) -> tuple[str, str]:
    return "insert", collection


def replace(collection: str) -> tuple[str, str]:
    return "replace", collection


def put_all(collection: str) -> tuple[str, str]:
    return "put_all", collection


CASES = {
    case.name or case.consumer: case
    for case in (
        Case("datasets", Topic.DATASETS, an_upload, profiled, ["dataset.profiled.v1"], insert("dataset_profiles")),
        Case("training", Topic.FINE_TUNES, a_fine_tune, submitted, ["fine_tune.queued.v1"], insert("training_runs")),
        Case(
            "serving", Topic.DEPLOYMENTS, a_deployment, served,
            ["deployment.applied.v1", "deployment.ready.v1"], insert("releases"),
        ),
        Case("jobs", Topic.FINE_TUNES, a_started_fine_tune, job_runs, [], put_all("jobs")),
        Case(
            "training", Topic.FINE_TUNES, a_cancelled_fine_tune, cancelled,
            ["fine_tune.queued.v1", "fine_tune.cancelled.v1"], replace("training_runs"), name="training cancels",
        ),
        Case(
            "datasets", Topic.DATASETS, a_deleted_upload, removed, ["dataset.profiled.v1"],
            replace("dataset_profiles"), name="datasets removes",
        ),
        Case("routes", Topic.DEPLOYMENTS, a_ready_deployment, routed, [], put_all("routes")),
    )
}  # fmt: skip


def crash_after(studio: Studio, method: str, collection: str) -> list[str]:
    """The next such write is done, and then the process goes away as far as its caller can tell. The list fills when it happened."""
    real, crashed = getattr(studio.store, method), []

    async def write(into: Collection, *rest: Any) -> Any:
        result = await real(into, *rest)
        if into.name == collection and not crashed:
            crashed.append(collection)
            raise Unavailable("killed after the write")
        return result

    setattr(studio.store, method, write)
    return crashed
