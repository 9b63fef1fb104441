"""A real Ray head whose processes are killed while the real trainer trains, with the watcher and a real record store beside it.

Ray away, its refusals and its lost workers are proven in tests/contracts/test_training_cluster_ray.py, the watcher's decisions one by
one in tests/consumers/test_watchers.py; a whole studio killed in mid-training in tests/e2e.
"""

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from consumers.watchers import attempts, training
from events.fine_tuning import DatasetRef, FineTuneProgressed, FineTuneQueued, FineTuneRequested, Hyperparameters
from events.registry import restore
from events.types import new_id
from mini_studio.drivers.catalogue import ModelCatalogue
from mini_studio.drivers.ports import Workers
from mini_studio.drivers.ray import RayCluster
from mini_studio.ingest import key_of
from mini_studio.records.record import ANYONE
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.settings import Settings, Training
from mini_studio.wiring import Studio, open_studio
from tests.consumers.cases import envelope, eventually
from tests.fakes.ray_head import RayHead, command_line, running_head, stub_trainer
from tests.fakes.running import ROWS
from tests.faults.length import length
from workloads.specs import CHECKPOINTS, MANIFEST, PROGRESS, WEIGHTS, Manifest, Progress

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

LOST_AFTER_S = 10.0
ORPHAN_S = 30.0
PARTS = ["raylet/raylet", "gcs_server"][: int(length(short=1, full=2))]
"""What of a head is killed. Without its store it goes the same way as without its raylet."""
RAY_S = 60.0
"""How long Ray may take to be there again, on a busy machine."""


@pytest.fixture
def head() -> Iterator[RayHead]:
    """A head of the test's own, since it is killed."""
    with running_head() as head:
        yield head


@pytest.fixture
async def studio(tmp_path: Path, head: RayHead) -> AsyncIterator[Studio]:
    """With the base model installed, and its watcher running."""
    settings = Settings(
        data=tmp_path,
        training=Training(
            ray_address=head.address, lost_after_s=LOST_AFTER_S, poll_s=0.2, threads=1, checkpoint_every_s=0.2
        ),
    )
    list(ModelCatalogue(settings.models).add("tiny-llama"))
    async with open_studio(settings) as studio:
        watching = asyncio.create_task(training.watch(studio))
        yield studio
        watching.cancel()
        for process in trainers(tmp_path):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def trainers(data: Path) -> list[psutil.Process]:
    """The processes that train for this studio."""
    return [p for p in psutil.process_iter() if f"{data}/" in (line := command_line(p)) and "workloads.train" in line]


async def requested(studio: Studio) -> str:
    """A job of about half a minute, queued."""
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    location = studio.dfs.location("datasets/rows.jsonl")
    file = studio.settings.dfs / key_of(location)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    event = FineTuneRequested(
        job_id=new_id("job"),
        base_model="tiny-llama",
        fine_tuned_model="ft:tiny-llama:acme:x",
        dataset=DatasetRef(
            id=new_id("ds"),
            dfs_path=location,
            sha256=hashlib.sha256(content).hexdigest(),
            rows=len(ROWS),
        ),
        hyperparameters=Hyperparameters(
            n_epochs=500,
            batch_size=6,
            learning_rate_multiplier=0.1,
            prompt_loss_weight=0.01,
            seed=1,
            method="full",
        ),
    )
    await studio.runs.insert(TrainingRun.claim(envelope(event, event.job_id)))
    studio.runs_changed.set()
    return event.job_id


async def run_of(studio: Studio, id: str) -> TrainingRun:
    run = await studio.runs.get(ANYONE, id)
    assert run is not None
    return run


async def in_training(studio: Studio, id: str) -> TrainingRun:
    """The run, once its trainer has made its first steps and kept a checkpoint: mostly its first attempt, a slow Ray may have
    cost it one before."""

    async def stepped() -> TrainingRun | None:
        run = await run_of(studio, id)
        kept = (attempts.folder(run, studio.settings) / CHECKPOINTS).glob("*.json")
        return run if any(steps(event) == run.attempt for event in decided(run)) and any(kept) else None

    found: TrainingRun = await eventually(stepped, RAY_S)
    assert found.phase is RunPhase.RUNNING
    return found


def steps(event: Any) -> int | None:
    """The attempt whose step an event tells of."""
    return event.attempt if isinstance(event, FineTuneProgressed) and event.step else None


async def over(studio: Studio, id: str) -> TrainingRun:
    async def ended() -> TrainingRun | None:
        run = await run_of(studio, id)
        return run if run.phase.over else None

    run: TrainingRun = await eventually(ended, 240)
    return run


def decided(run: TrainingRun) -> list[Any]:
    """All its events: nothing relays them here."""
    return [restore(entry).data for entry in run.outbox]


def writes_late(folder: Path, run: TrainingRun) -> None:
    """What an attempt that was given up may still do to its own folder."""
    (folder / WEIGHTS).mkdir(exist_ok=True)
    late = Progress(kind="progress", time=time.time(), step=999, total_steps=999, train_loss=0.0, epoch=1.0)
    with (folder / PROGRESS).open("a") as file:
        file.write(late.model_dump_json() + "\n")
    manifest = Manifest(
        job_id=run.id, attempt=run.attempt, token=run.token, files=[], train_loss=0.0, steps=999, tokens=1
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def succeeded_at_the_next_attempt(run: TrainingRun, first: TrainingRun, studio: Studio) -> None:
    """With exactly one artifact chosen, and nothing told of the attempt before after it was lost."""
    events, following = decided(run), first.attempt + 1
    assert (run.phase, run.attempt) == (RunPhase.SUCCEEDED, following), events[-1]
    assert str(attempts.final_path(run, studio.settings).readlink()) == f"attempts/{following}/{WEIGHTS}"
    assert sum(event.TYPE == "fine_tune.succeeded.v1" for event in events) == 1
    lost = [n for n, event in enumerate(events) if isinstance(event, FineTuneQueued) and event.attempt == first.attempt]
    assert len(lost) == 1
    assert {event.attempt for event in events[lost[0] + 1 :]} == {following}
    assert all(event.step != 999 for event in events if isinstance(event, FineTuneProgressed))
    said, _ = attempts.read_progress(attempts.folder(run, studio.settings), 0)
    assert any("resumed from step" in (line.message or "") for line in said), "it starts where the one before was"
    assert not list(attempts.job_folder(run, studio.settings).glob(f"attempts/*/{CHECKPOINTS}"))


async def test_fifty_submits_of_one_job_are_one_run(head: RayHead, tmp_path: Path) -> None:
    spec, cluster = tmp_path / "spec.json", RayCluster(head.address, timeout_s=60, **stub_trainer())
    spec.write_text("{}")
    metadata = {"job_id": "job_1", "attempt": "1"}
    await asyncio.gather(
        *(cluster.submit("many-1", spec, workers=Workers(cpus=0.01), metadata=metadata) for _ in range(50))
    )
    seen = Path(f"{spec}.seen")
    for _ in range(600):
        if seen.exists():
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(3)
    assert len(seen.read_text().splitlines()) == 1
    Path(f"{spec}.exit").write_text("0")
    await cluster.aclose()


async def test_a_head_that_dies_and_comes_back_empty(head: RayHead, studio: Studio) -> None:
    id = await requested(studio)
    first = await in_training(studio, id)
    orphans = trainers(studio.settings.data)
    assert orphans
    for orphan in orphans:
        orphan.suspend()  # else it may be done before a slow Ray is back, and its artifact is a good one
    await asyncio.to_thread(head.kill)
    killed_at = time.monotonic()
    head.start()
    await asyncio.to_thread(head.wait)
    for orphan in orphans:
        orphan.resume()
    back_at = time.monotonic()

    async def lost() -> bool:
        return (await run_of(studio, id)).token != first.token

    await eventually(lost, ORPHAN_S)
    _, alive = await asyncio.to_thread(psutil.wait_procs, orphans, back_at + ORPHAN_S - time.monotonic())
    assert not alive, "the orphan did not see its fence"
    gone_at = time.monotonic()
    print(f"the orphan was gone {gone_at - killed_at:.1f} s after the head, {gone_at - back_at:.1f} s after its return")
    writes_late(attempts.folder(first, studio.settings), first)
    succeeded_at_the_next_attempt(await over(studio, id), first, studio)


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_of_the_head_that_dies_is_not_running_for_ever(head: RayHead, studio: Studio, part: str) -> None:
    id = await requested(studio)
    first = await in_training(studio, id)
    (process,) = head.named(part)
    process.kill()
    killed_at = time.monotonic()
    while head.process.poll() is None and time.monotonic() - killed_at < LOST_AFTER_S + 20:
        await asyncio.sleep(0.2)  # as the launcher's supervisor does: a head that ends is started again
    if head.process.poll() is not None:
        print(f"the head ended {time.monotonic() - killed_at:.1f} s after {part}")
        head.start()
        await asyncio.to_thread(head.wait)

    async def lost() -> bool:
        return (await run_of(studio, id)).token != first.token

    await eventually(lost, LOST_AFTER_S + RAY_S)
    print(f"the attempt counted as lost {time.monotonic() - killed_at:.1f} s after {part}")
    writes_late(attempts.folder(first, studio.settings), first)
    succeeded_at_the_next_attempt(await over(studio, id), first, studio)
