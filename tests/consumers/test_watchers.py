"""What the watchers make of trainers, clusters and servers that misbehave. Records and attempt folders are real, nobody else is."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from consumers import datasets
from consumers.watchers import attempts, serving, training
from events.datasets import DatasetUploaded
from events.deployments import DeployRequested, UndeployRequested
from events.types import DatasetFormat, new_id
from mini_studio.drivers.dfs import PARTIAL, DfsStore
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.records.training_runs import MAX_INTERRUPTIONS, RunPhase, TrainingRun
from mini_studio.settings import Settings, Training
from mini_studio.wiring import Studio, ended, open_studio
from tests.consumers.cases import deploy, envelope, fine_tune
from tests.fakes.serving_driver import FakeServingDriver
from tests.fakes.training_cluster import FakeTrainingCluster
from tests.fakes.waiting import until
from workloads.specs import CHECKPOINTS, MANIFEST, PROGRESS, WEIGHTS, Manifest, ManifestFile, Progress


@pytest.fixture
def cluster() -> FakeTrainingCluster:
    return FakeTrainingCluster()


@pytest.fixture
def servers() -> FakeServingDriver:
    return FakeServingDriver()


@pytest_asyncio.fixture
async def studio(tmp_path: Path, cluster: FakeTrainingCluster, servers: FakeServingDriver) -> AsyncIterator[Studio]:
    settings = Settings(data=tmp_path, training=Training(max_running=10, max_attempts=2, lost_after_s=0.2))
    async with open_studio(settings) as studio:
        studio.cluster, studio.serving = cluster, servers
        yield studio


async def queued(studio: Studio) -> str:
    id = new_id("job")
    await studio.runs.insert(TrainingRun.claim(envelope(fine_tune(id), id)))
    return id


async def run_of(studio: Studio, id: str) -> TrainingRun:
    run = await studio.runs.get(ANYONE, id)
    assert run is not None
    return run


def says(studio: Studio, run: TrainingRun, *lines: Progress) -> None:
    with (attempts.folder(run, studio.settings) / PROGRESS).open("a") as file:
        file.writelines(line.model_dump_json() + "\n" for line in lines)


def steps(number: int) -> Progress:
    return Progress(kind="progress", time=time.time(), step=number, total_steps=9, train_loss=0.5, epoch=0.1)


def finishes(studio: Studio, run: TrainingRun, content: bytes) -> None:
    folder = attempts.folder(run, studio.settings)
    (folder / WEIGHTS).mkdir()
    (folder / WEIGHTS / "model.safetensors").write_bytes(content)
    entry = ManifestFile(path="model.safetensors", size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = Manifest(
        job_id=run.id, attempt=run.attempt, token=run.token, files=[entry], train_loss=0.1, steps=9, tokens=5
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())


def told(run: TrainingRun | Release) -> list[str]:
    return [entry["headers"]["ce_type"] for entry in run.outbox]


async def test_a_run_goes_from_queued_to_its_artifact(studio: Studio) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert (run.phase, run.attempt) == (RunPhase.SUBMITTED, 1)
    says(studio, run, steps(1))
    finishes(studio, run, b"first")
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert run.phase is RunPhase.SUCCEEDED
    assert (attempts.final_path(run, studio.settings) / "model.safetensors").read_bytes() == b"first"
    assert told(run) == [f"fine_tune.{name}.v1" for name in ("queued", "started", "progressed", "succeeded")]


async def test_one_runs_trouble_does_not_stop_the_others(studio: Studio) -> None:
    ids = [await queued(studio) for _ in range(3)]
    for id in ids[:2]:
        broken = attempts.job_folder(await run_of(studio, id), studio.settings)
        broken.parent.mkdir(parents=True, exist_ok=True)
        broken.write_text("a file stands where the job's folder belongs")
    await training.reconcile(studio)
    run = await run_of(studio, ids[2])
    assert run.phase is RunPhase.SUBMITTED
    says(studio, run, steps(1))
    finishes(studio, run, b"fine")
    await training.reconcile(studio)
    assert (await run_of(studio, ids[2])).phase is RunPhase.SUCCEEDED


async def test_a_silent_trainer_is_replaced_and_its_late_artifact_is_not_published(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    first = await run_of(studio, id)
    says(studio, first, steps(1))
    await training.reconcile(studio)
    await falls_silent(studio, first)
    await training.reconcile(studio)
    assert cluster.stops == [first.submission_id]
    assert (await run_of(studio, id)).phase in (RunPhase.QUEUED, RunPhase.SUBMITTED)
    finishes(studio, first, b"late")
    await training.reconcile(studio)
    second = await run_of(studio, id)
    assert (second.phase, second.attempt) == (RunPhase.SUBMITTED, 2)
    assert second.token != first.token
    says(studio, second, steps(1))
    finishes(studio, second, b"second")
    await training.reconcile(studio)
    final = attempts.final_path(second, studio.settings)
    assert (final / "model.safetensors").read_bytes() == b"second"


async def lost_again(studio: Studio, id: str, lose: Callable[[str], None]) -> TrainingRun:
    """One more attempt, whose trainer says that it started, and is lost."""
    await training.reconcile(studio)
    run = await run_of(studio, id)
    if run.phase is RunPhase.SUBMITTED:
        says(studio, run, Progress(kind="started", time=time.time()))
        await training.reconcile(studio)
        await falls_silent(studio, run)
        lose(run.submission_id)
        await training.reconcile(studio)
    return await run_of(studio, id)


async def test_restarts_of_the_cluster_do_not_count_against_a_job(studio: Studio, cluster: FakeTrainingCluster) -> None:
    id = await queued(studio)
    for _ in range(studio.settings.training.max_attempts + 2):
        run = await lost_again(studio, id, lambda _: cluster.forget())
    assert run.phase in (RunPhase.QUEUED, RunPhase.SUBMITTED)
    for _ in range(MAX_INTERRUPTIONS):
        run = await lost_again(studio, id, lambda _: cluster.forget())
    assert run.phase is RunPhase.FAILED, "but it does not go on for ever"


async def test_a_trainer_killed_again_and_again_ends_the_job_with_its_log(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    id = await queued(studio)
    for _ in range(studio.settings.training.max_attempts):
        run = await lost_again(studio, id, lambda name: cluster.fail(name, 137, ["loading the model"]))
    assert run.phase is RunPhase.FAILED
    assert all(word in run.outbox[-1]["value"] for word in ("Gave up after 2 attempts", "137", "loading the model"))


async def test_a_manifest_that_names_other_files_than_there_are_ends_the_job(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    says(studio, run, steps(1))
    finishes(studio, run, b"whole")
    (attempts.folder(run, studio.settings) / WEIGHTS / "model.safetensors").write_bytes(b"cut")
    await training.reconcile(studio)
    await falls_silent(studio, run)
    cluster.finish(run.submission_id)
    await training.reconcile(studio)
    assert (await run_of(studio, id)).phase is RunPhase.FAILED


async def test_a_folder_that_cannot_be_written_ends_the_job_with_the_cause(studio: Studio) -> None:
    id = await queued(studio)
    client = attempts.job_folder(await run_of(studio, id), studio.settings).parent
    client.parent.mkdir(parents=True, exist_ok=True)
    client.write_text("a file where a folder should be")
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert run.phase is RunPhase.FAILED
    assert "cannot be written" in run.outbox[-1]["value"]


async def test_a_cluster_that_is_away_costs_no_attempt(studio: Studio, cluster: FakeTrainingCluster) -> None:
    id = await queued(studio)
    cluster.away = True
    for _ in range(5):
        await training.reconcile(studio)
    assert (await run_of(studio, id)).phase is RunPhase.QUEUED
    cluster.away = False
    await training.reconcile(studio)
    assert (await run_of(studio, id)).attempt == 1


async def test_what_the_cluster_never_has_room_for_waits_and_says_why_once(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    id = await queued(studio)
    cluster.cpus = 0.5
    for _ in range(3):
        await training.reconcile(studio)
    run = await run_of(studio, id)
    assert (run.phase, cluster.submits) == (RunPhase.QUEUED, 0)
    assert told(run) == ["fine_tune.queued.v1"] * 2
    assert "too small" in run.outbox[-1]["value"]
    cluster.cpus = 1.0
    await training.reconcile(studio)
    assert (await run_of(studio, id)).phase is RunPhase.SUBMITTED


async def test_no_more_is_submitted_than_there_is_room_for(studio: Studio, cluster: FakeTrainingCluster) -> None:
    cluster.cpus = 2.0
    ids = [await queued(studio) for _ in range(3)]
    for _ in range(2):
        await training.reconcile(studio)
    runs = [await run_of(studio, id) for id in ids]
    assert sorted(run.phase for run in runs) == [RunPhase.QUEUED, RunPhase.SUBMITTED, RunPhase.SUBMITTED]
    assert [told(run) for run in runs] == [["fine_tune.queued.v1"]] * 3, (
        "nothing has to be mended: it is only not its turn"
    )


async def test_a_token_that_is_refused_is_told_in_the_job(studio: Studio, cluster: FakeTrainingCluster) -> None:
    id = await queued(studio)
    cluster.denies = "set MINI_STUDIO_TRAINING__RAY_TOKEN"
    for _ in range(3):
        await training.reconcile(studio)
    run = await run_of(studio, id)
    assert (run.phase, run.attempt, told(run)) == (RunPhase.QUEUED, 0, ["fine_tune.queued.v1"] * 2)
    assert "MINI_STUDIO_TRAINING__RAY_TOKEN" in run.outbox[-1]["value"]


async def test_a_lost_worker_costs_the_attempt_and_not_the_job(studio: Studio) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    first = await run_of(studio, id)
    says(studio, first, steps(1), Progress(kind="failed", time=time.time(), code="lost_worker", message="one is gone"))
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert (run.phase, run.attempt, run.failures) == (RunPhase.SUBMITTED, 2, 1)
    assert any("one is gone" in entry["value"] for entry in run.outbox)


def checkpoint(studio: Studio, run: TrainingRun) -> Path:
    """What counts for the studio is that there is one."""
    folder = attempts.folder(run, studio.settings) / CHECKPOINTS
    folder.mkdir()
    (folder / "step-7.json").write_text("{}")
    return folder


async def test_checkpoints_stay_until_the_job_is_over(studio: Studio, cluster: FakeTrainingCluster) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    left = []
    for number in (1, 2, 3):
        run = await run_of(studio, id)
        says(studio, run, Progress(kind="started", time=time.time()))
        if number != 2:
            left.append(checkpoint(studio, run))
        await training.reconcile(studio)
        says(studio, run, Progress(kind="failed", time=time.time(), code="stopped", message="asked to"))
        await training.reconcile(studio)
    assert (await run_of(studio, id)).attempt == 4
    assert [folder.exists() for folder in left] == [False, True], "the newest one is kept for the next attempt"
    run = await run_of(studio, id)
    says(studio, run, steps(9))
    finishes(studio, run, b"done")
    await training.reconcile(studio)
    assert (await run_of(studio, id)).phase is RunPhase.SUCCEEDED
    assert not any(folder.exists() for folder in left)


@pytest.mark.parametrize("way", ["fails", "is lost too often"])
async def test_the_checkpoints_of_a_failed_job_are_removed(
    studio: Studio, cluster: FakeTrainingCluster, way: str
) -> None:
    studio.settings.training.max_attempts = 1
    id = await queued(studio)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    folder = checkpoint(studio, run)
    code = "bad_row" if way == "fails" else "lost_worker"
    says(studio, run, steps(1), Progress(kind="failed", time=time.time(), code=code, message="x"))
    await training.reconcile(studio)
    assert (await run_of(studio, id)).phase is RunPhase.FAILED
    assert not folder.exists()


async def test_a_trainers_own_failure_ends_the_job_with_its_log(studio: Studio, cluster: FakeTrainingCluster) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    cluster.runs[run.submission_id].log += ["epoch 1", "no memory"]
    says(studio, run, Progress(kind="failed", time=time.time(), code="out_of_memory", message="take smaller batches"))
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert run.phase is RunPhase.FAILED
    assert all(word in run.outbox[-1]["value"] for word in ("out_of_memory", "take smaller batches", "no memory"))


async def test_a_crash_between_commit_and_announcement_is_repaired(studio: Studio) -> None:
    id = await queued(studio)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    finishes(studio, run, b"weights")
    await studio.runs.change(ANYONE, id, lambda run: run.started(run.token))
    await studio.runs.change(ANYONE, id, lambda run: run.commit(run.token))
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert run.phase is RunPhase.SUCCEEDED
    assert attempts.final_path(run, studio.settings).is_dir()


async def released(studio: Studio, **scale: int) -> DeployRequested:
    id = new_id("dep")
    request = deploy(id)
    request = request.model_copy(update={"scale": request.scale.model_copy(update=scale)})
    await studio.releases.insert(Release.claim(envelope(request, id)))
    return request


async def release_of(studio: Studio, request: DeployRequested) -> Release:
    release = await studio.releases.get(ANYONE, request.deployment_id)
    assert release is not None
    return release


async def test_one_releases_trouble_does_not_stop_the_others(studio: Studio, servers: FakeServingDriver) -> None:
    broken, fine = await released(studio), await released(studio)
    real = servers.apply

    async def apply(spec: ReleaseSpec) -> None:
        if spec.name == broken.name:
            raise OSError("a surprise")
        await real(spec)

    servers.apply = apply  # type: ignore[method-assign]
    await serving.reconcile(studio)
    assert (await release_of(studio, fine)).status == "ready"
    assert (await release_of(studio, broken)).status == "deploying"


async def test_servers_that_are_away_are_waited_for(studio: Studio, servers: FakeServingDriver) -> None:
    request = await released(studio)
    servers.away = True
    await serving.reconcile(studio)
    assert told(await release_of(studio, request)) == []
    servers.away = False
    await serving.reconcile(studio)
    assert told(await release_of(studio, request)) == ["deployment.applied.v1", "deployment.ready.v1"]


async def test_a_refused_release_is_left_alone(studio: Studio, servers: FakeServingDriver) -> None:
    request = await released(studio)
    servers.refuses = "quota exceeded"
    await serving.reconcile(studio)
    servers.refuses = None
    await serving.reconcile(studio)
    release = await release_of(studio, request)
    assert told(release) == ["deployment.failed.v1"]
    assert "quota exceeded" in release.outbox[0]["value"]


async def test_a_crashed_server_is_reported_and_so_is_its_return(studio: Studio, servers: FakeServingDriver) -> None:
    request = await released(studio)
    await serving.reconcile(studio)
    servers.crash(request.name)
    await serving.reconcile(studio)
    assert (await release_of(studio, request)).endpoints == []
    servers.ready(request.name)
    await serving.reconcile(studio)
    names = ("applied", "ready", "applied", "ready")
    assert told(await release_of(studio, request)) == [f"deployment.{name}.v1" for name in names]


async def test_every_change_of_scale_is_reported_once(studio: Studio, servers: FakeServingDriver) -> None:
    request = await released(studio)
    for replicas in (1, 3, 3, 0, 1):
        await serving.reconcile(studio)
        servers.scale(request.name, replicas)
        await serving.reconcile(studio)
    release = await release_of(studio, request)
    ready = [json.loads(entry["value"]) for entry in release.outbox if entry["headers"]["ce_type"].endswith("ready.v1")]
    assert [event["replicas"] for event in ready] == [1, 3, 0, 1]
    assert {tuple(event["endpoints"]) for event in ready} == {(servers.endpoint,)}


async def test_a_deployment_that_wakes_stays_ready_however_long_it_sleeps(
    studio: Studio, servers: FakeServingDriver
) -> None:
    request = await released(studio, min_replicas=0)
    await serving.reconcile(studio)
    servers.scale(request.name, 0)
    await serving.reconcile(studio)
    long_ago = time.time() - 2 * studio.settings.serving.ready_timeout_s
    await studio.releases.change(ANYONE, request.deployment_id, lambda r: r.model_copy(update={"applied_at": long_ago}))
    servers.crash(request.name)  # a replica starts
    await serving.reconcile(studio)
    waking = await release_of(studio, request)
    assert (waking.status, waking.endpoints, waking.replicas) == ("ready", [servers.endpoint], 0)
    servers.ready(request.name)
    servers.scale(request.name, 1)
    await serving.reconcile(studio)
    assert told(await release_of(studio, request)) == ["deployment.applied.v1", *3 * ["deployment.ready.v1"]]


async def test_a_wake_up_is_followed_at_once_for_what_sleeps_and_for_nothing_else(
    studio: Studio, servers: FakeServingDriver
) -> None:
    sleeping, awake = await released(studio, min_replicas=0), await released(studio, min_replicas=0)
    await serving.reconcile(studio)
    servers.scale(sleeping.name, 0)
    await serving.reconcile(studio)
    for id in (sleeping.deployment_id, awake.deployment_id, new_id("dep"), "../x"):
        await serving.wake(id, studio)
    assert servers.woken == [sleeping.name]
    release = await release_of(studio, sleeping)
    assert (release.status, release.replicas) == ("ready", 1), "applied and reported, without another turn"


async def test_what_wakes_is_looked_at_often(studio: Studio, servers: FakeServingDriver) -> None:
    studio.settings.serving.poll_s = 5.0
    request = await released(studio, min_replicas=0)
    await serving.reconcile(studio)
    servers.scale(request.name, 0)
    assert await serving.reconcile(studio) == 5.0
    servers.crash(request.name)  # a replica starts
    await serving.wake(request.deployment_id, studio)
    assert studio.releases_changed.is_set()
    assert await serving.reconcile(studio) == serving.WAKING_S


async def test_a_removed_or_unreachable_release_is_not_woken(studio: Studio, servers: FakeServingDriver) -> None:
    request = await released(studio, min_replicas=0)
    await serving.reconcile(studio)
    servers.scale(request.name, 0)
    await serving.reconcile(studio)
    servers.away = True
    await serving.wake(request.deployment_id, studio)
    servers.away = False
    undeploy = UndeployRequested(deployment_id=request.deployment_id, generation=2, name=request.name)
    await studio.releases.change(ANYONE, request.deployment_id, lambda r: r.want(envelope(undeploy, r.id)))
    await serving.wake(request.deployment_id, studio)
    assert servers.woken == []


async def test_a_server_that_crashes_after_long_service_is_starting_not_late(
    studio: Studio, servers: FakeServingDriver
) -> None:
    request = await released(studio)
    await serving.reconcile(studio)
    long_ago = time.time() - 2 * studio.settings.serving.ready_timeout_s
    await studio.releases.change(ANYONE, request.deployment_id, lambda r: r.model_copy(update={"applied_at": long_ago}))
    servers.crash(request.name)
    await serving.reconcile(studio)
    assert told(await release_of(studio, request)) == [
        f"deployment.{name}.v1" for name in ("applied", "ready", "applied")
    ]


async def test_halves_of_uploads_are_swept_when_they_are_old(studio: Studio, tmp_path: Path) -> None:
    studio.s3 = DfsStore(tmp_path / "s3")  # type: ignore[assignment]
    old = [root / "datasets" / f"{PARTIAL}old" for root in (studio.settings.dfs, tmp_path / "s3")]
    new = old[0].with_name(f"{PARTIAL}new")
    for file in (*old, new):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for file in old:
        os.utime(file, (0, 0))
    sweeping = asyncio.create_task(datasets.sweep(studio))
    await until(lambda: not any(file.exists() for file in old))
    await ended(sweeping)
    assert new.exists()


async def test_what_is_applied_after_its_removal_is_swept(studio: Studio, servers: FakeServingDriver) -> None:
    request, other = await released(studio), await released(studio)
    await serving.reconcile(studio)
    late = await release_of(studio, request)
    wanted_no_more = UndeployRequested(deployment_id=late.id, generation=2, name=request.name)
    await studio.releases.change(ANYONE, late.id, lambda r: r.want(envelope(wanted_no_more, late.id, 2)))
    await serving.reconcile(studio)
    await serving.keep(late, studio)
    assert request.name in servers.releases, "a slow watcher has brought it back"
    await serving.sweep(studio)
    assert list(servers.releases) == [other.name]
    assert (await release_of(studio, request)).status == "removed"


async def falls_silent(studio: Studio, run: TrainingRun) -> None:
    """As if nothing had come of the trainer for 10 s."""
    past = time.time() - 10
    await studio.runs.change(ANYONE, run.id, lambda run: run.model_copy(update={"submitted_at": past}))
    os.utime(attempts.folder(run, studio.settings) / PROGRESS, (past, past))


async def test_a_moved_data_folder_makes_no_orphans(studio: Studio, tmp_path: Path) -> None:
    id = new_id("ds")
    key = f"datasets/{id}.jsonl"
    event = DatasetUploaded(
        dataset_id=id, dfs_path=studio.dfs.location(key), s3_uri=studio.s3.location(key), size_bytes=1, sha256="0" * 64,
        format=DatasetFormat.CHAT, rows=1, characters=1, longest_line_bytes=1,
    )  # fmt: skip
    await studio.datasets.apply(envelope(event, id))
    assert await datasets.recorded(studio, key)
    studio.dfs = DfsStore(tmp_path / "elsewhere")
    assert await datasets.recorded(studio, key)
    assert not await datasets.recorded(studio, "datasets/nobodys.jsonl")
