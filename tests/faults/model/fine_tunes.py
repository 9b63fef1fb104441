"""One fine-tune, from its request to its artifact or cancel: the handlers, the relay, the watchers and the transitions are the real ones.

The world around them is small: a record store, a journal, a log, and what stands in tests/faults/model/cluster.py.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from api import submissions
from consumers import jobs, training
from consumers.watchers import training as watcher
from mini_studio.bus.relay import Relay
from mini_studio.records.jobs import Job
from mini_studio.records.projection import Projections, requested
from mini_studio.records.record import Repository
from mini_studio.records.store import DuplicateRecord
from mini_studio.records.training_runs import TrainingRun
from mini_studio.settings import Settings, Training
from tests.consumers.cases import CAUSE, fine_tune
from tests.faults.model.actors import Actors
from tests.faults.model.cluster import Cluster, Faults, Folder, World, answers, dies, trains
from tests.faults.model.kernel import Call, Explored, Programs, Thread, explore
from tests.faults.model.parts import (
    Docs,
    ModelPublisher,
    ModelStore,
    document,
    event,
    pending,
    wrong_events,
    wrong_projection,
)

JOB = "job_" + "0" * 24
REQUEST = fine_tune(JOB).model_copy(
    update={"dataset": fine_tune(JOB).dataset.model_copy(update={"id": "ds_" + "0" * 24})}
)
SETTINGS = Settings(data=Path("/studio"), training=Training(max_attempts=2, threads=1))
OUTBOXES = (Job.COLLECTION, TrainingRun.COLLECTION)
READERS = ("training", "jobs")
OVER = ("succeeded", "failed", "cancelled")
ENDS = tuple(f"fine_tune.{end}.v1" for end in OVER)


def studio() -> Any:
    store = ModelStore()
    return SimpleNamespace(
        settings=SETTINGS, store=store, cluster=Cluster(), runs_changed=SimpleNamespace(set=lambda: None),
        jobs=Projections(store, Job), runs=Repository(store, TrainingRun),
    )  # fmt: skip


async def submit_fine_tune(of: Any) -> None:
    """As the API does it; the id is derived from the Idempotency-Key, so a repeat finds the record there."""
    record = requested(Job, REQUEST, subject=JOB, client_code="acme", cause=CAUSE)
    with contextlib.suppress(DuplicateRecord):
        await of.jobs.insert(record)


async def turn(id: str, of: Any) -> None:
    """One watcher's turn on the run as it finds it."""
    run = await of.runs.get("*", id)
    if run is not None and run.phase == "queued":
        await watcher.start(run, of, 0)
    elif run is not None and not run.phase.over:
        await watcher.follow(run, of)


Maker = Callable[..., Any]


def programs(replaced: dict[str, Maker]) -> Programs:
    """`replaced`: programs with a seeded bug, instead of the real ones."""
    of = studio()

    def relay() -> Any:
        return Relay(of.store, ModelPublisher(), OUTBOXES).sweep()  # type: ignore[arg-type]

    def deliver(consumer: Any) -> Maker:
        async def batch(_offset: int, ids: tuple[str, ...]) -> None:
            wanted = [event(id) for id in ids if type(event(id).data) in consumer.handlers]
            if consumer is jobs.consumer:
                await jobs.project(wanted, of)
            else:
                for envelope in wanted:
                    await consumer.deliver(envelope, of)

        return batch

    makers: dict[str, Maker] = {
        "api": lambda: submit_fine_tune(of), "relay": relay, "training": deliver(training.consumer),
        "jobs": deliver(jobs.consumer), "watcher": lambda: turn(JOB, of),
        "cancel": lambda: submissions.cancel(of, JOB, "acme", CAUSE),
    }  # fmt: skip
    return Programs(makers | {name: make(of) for name, make in replaced.items()})


# --- all steps


class FineTunes(Actors):
    """The model of one fine-tune. `replaced`: programs with a seeded bug, instead of the real ones."""

    READERS = READERS
    FAIR = ("relay", *READERS, "watcher", "api", "cancel")

    def __init__(
        self, slots: Sequence[str], faults: Faults, *, replaced: dict[str, Maker] | None = None, **how: Any
    ) -> None:
        super().__init__(slots, programs(replaced or {}), **how)
        self._faults = faults
        self._cancels = any(slot.startswith("cancel") for slot in slots)

    def start(self) -> World:
        return World(self._faults, (None,) * len(self._slots))

    def claimed(self) -> World:
        """A world in which everything up to the claim has gone well."""
        return self.until(self.start(), lambda world: document(world.docs, "training_runs") is not None, "watcher")

    def under_way(self) -> World:
        """A world in which the first attempt runs, and the watcher knows it."""
        world = self.until(self.claimed(), lambda world: bool(world.trainers), "")
        world = self.until(world, lambda world: world.trainers[0].at == "trained", "")
        return self.until_done(world, "watcher")

    def complete(self) -> World:
        """A world in which the first attempt has its artifact, the watcher does not know it, and a cancel is on the log."""
        return self.until(self.under_way(), lambda world: any("cancel_requested" in id for id in world.log), "watcher")

    def search(self, start: World, limit: int) -> Explored:
        return explore(self.model(wrong, wrong_step, wrong_end, reached), start, limit)

    def answers(self, world: World, call: Call, *, fair: bool) -> Iterator[tuple[str, World, Any]]:
        return answers(world, call, fair=fair)

    def due(self, world: World, name: str) -> bool:
        run = document(world.docs, "training_runs")
        match name:
            case "api":
                return not world.acknowledged
            case "cancel":
                return self._cancels and world.acknowledged and not world.answered
            case "relay":
                return bool(pending(world.docs))
            case _:
                return run is not None and run["phase"] not in OVER

    def done(self, world: World, thread: Thread) -> World:
        match thread.program:
            case "api":
                return world._replace(acknowledged=True)
            case "cancel":
                return world._replace(answered=True)
        return world

    def surroundings(self, world: World) -> Iterator[tuple[str, World]]:
        for trainer in dict.fromkeys(world.trainers):
            for what, after in (*trains(world, trainer), *dies(world, trainer)):
                yield f"trainer {trainer.attempt} {what}", after
        if world.ray and (left := world.faults.spend("forget")):
            poorer = world._replace(faults=left, ray=())
            yield "ray forgets, its trainers end", poorer.with_trainers([t for t in world.trainers if not t.known])
            if world.trainers:
                orphans = [trainer._replace(known=False) for trainer in world.trainers]
                yield "ray forgets, its trainers go on", poorer.with_trainers(orphans)

    def fair_surroundings(self, world: World) -> Iterator[tuple[str, World]]:
        for trainer in world.trainers:
            for what, after in trains(world, trainer):
                yield f"trainer {trainer.attempt} {what}", after


# --- what must hold


def reached(world: World) -> str:
    """Where the search got, in a word."""
    run = document(world.docs, "training_runs")
    return f"{run['phase']} {run['attempt']}" if run else "requested"


def wrong(world: World) -> str | None:
    if world.acknowledged and not world.decided:
        return "a request was acknowledged and is in no record"
    return (
        wrong_events(world.docs, world.decided, world.journal, world.log)
        or wrong_projection(Job, world.docs, world.decided)
        or _wrong_ends(world.decided)
        or _wrong_artifact(world.docs, world.folders, world.linked)
    )


@lru_cache(maxsize=200_000)
def _wrong_ends(decided: Sequence[str]) -> str | None:
    ends = [id for id in decided if event(id).type in ENDS]
    return f"it ended more than once: {ends}" if len(ends) > 1 else None


@lru_cache(maxsize=200_000)
def _wrong_artifact(docs: Docs, folders: Sequence[tuple[int, Folder]], linked: int) -> str | None:
    """The artifact is the one of the attempt whose token holds, and nothing is published before it was chosen."""
    run = document(docs, "training_runs")
    chosen = run is not None and run["phase"] in ("committed", "succeeded")
    if not chosen:
        return f"attempt {linked} is published and was not chosen" if linked else None
    assert run is not None
    folder = dict(folders).get(run["attempt"], Folder(""))
    if folder.manifest != run["token"]:
        return f"attempt {run['attempt']} was chosen and has no artifact of its own: {folder}"
    return f"attempt {linked} is published, {run['attempt']} was chosen" if linked not in (0, run["attempt"]) else None


def wrong_step(before: World, after: World) -> str | None:
    if before.linked not in (0, after.linked):
        return f"the final path moved from attempt {before.linked} to {after.linked}"
    if before.docs is after.docs:
        return None
    for name, field in (("jobs", "status"), ("training_runs", "phase")):
        old, new = document(before.docs, name), document(after.docs, name)
        if old and new and old[field] in OVER and new[field] != old[field]:
            return f"{name} went from {old[field]} to {new[field]}"
        if old and new and old[field] == "cancelling" and new[field] not in ("cancelling", "cancelled"):
            return f"{name} was to be cancelled, and is {new[field]}"
    return None


def wrong_end(world: World) -> str | None:
    job, run = document(world.docs, "jobs"), document(world.docs, "training_runs")
    if job is None or run is None:
        return "the request was never taken up"
    if run["phase"] not in OVER or job["status"] != run["phase"]:
        return f"in the end the run is {run['phase']} and the job {job['status']}"
    if pending(world.docs):
        return f"in the end there waits {pending(world.docs)}"
    if {*world.decided} != {*world.log}:
        return f"in the end the log lacks { ({*world.decided} - {*world.log}) }"
    if run["phase"] == "succeeded" and world.linked != run["attempt"]:
        return f"attempt {run['attempt']} succeeded, {world.linked} is published"
    if run["phase"] == "cancelled" and (world.current or world.trainers):
        return f"it was cancelled, and in the end {world.current or world.trainers} may go on"
    return None
