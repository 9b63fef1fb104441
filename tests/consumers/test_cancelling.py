"""How a run is cancelled, whatever its trainer and the cluster do. Records and attempt folders are real, nobody else is."""

from pathlib import Path

import pytest

from consumers import training as consumer
from consumers.watchers import attempts, training
from events.fine_tuning import FineTuneCancelRequested
from mini_studio.drivers.ports import RunState
from mini_studio.errors import Conflict
from mini_studio.records.record import ANYONE
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.wiring import Studio
from tests.consumers.cases import CAUSE, envelope, fine_tune
from tests.consumers.test_watchers import (
    checkpoint,
    cluster,
    finishes,
    queued,
    run_of,
    says,
    servers,
    steps,
    studio,
    told,
)
from tests.fakes.training_cluster import FakeTrainingCluster
from workloads.specs import CURRENT_ATTEMPT, MANIFEST, WEIGHTS

__all__ = ["cluster", "servers", "studio"]


async def ask(studio: Studio, id: str) -> None:
    """As the handler does it."""
    wanted = envelope(FineTuneCancelRequested(job_id=id), id, 2)
    await studio.runs.change(ANYONE, id, lambda run: run.cancel(wanted))


async def under_way(studio: Studio) -> TrainingRun:
    id = await queued(studio)
    await training.reconcile(studio)
    says(studio, await run_of(studio, id), steps(1))
    await training.reconcile(studio)
    return await run_of(studio, id)


def token_file(studio: Studio, run: TrainingRun) -> Path:
    return attempts.job_folder(run, studio.settings) / CURRENT_ATTEMPT


async def test_a_queued_run_is_cancelled_at_once_and_never_submitted(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    id = await queued(studio)
    await ask(studio, id)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert (run.phase, cluster.submits) == (RunPhase.CANCELLED, 0)
    assert told(run) == ["fine_tune.queued.v1", "fine_tune.cancelled.v1"]


async def test_a_running_one_loses_its_token_is_stopped_and_leaves_nothing(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    run = await under_way(studio)
    left = checkpoint(studio, run)
    assert token_file(studio, run).exists()
    await ask(studio, run.id)
    finishes(studio, run, b"late")
    for _ in range(3):
        await training.reconcile(studio)
    run = await run_of(studio, run.id)
    folder = attempts.folder(run, studio.settings)
    assert (run.phase, cluster.stops) == (RunPhase.CANCELLED, [run.submission_id])
    assert told(run)[-1] == "fine_tune.cancelled.v1"
    assert not any(path.exists() for path in (token_file(studio, run), left, folder / MANIFEST, folder / WEIGHTS))
    assert not attempts.final_path(run, studio.settings).exists()


async def test_a_success_that_was_chosen_before_stands(studio: Studio, cluster: FakeTrainingCluster) -> None:
    run = await under_way(studio)
    finishes(studio, run, b"weights")
    await studio.runs.change(ANYONE, run.id, lambda run: run.commit(run.token))
    await ask(studio, run.id)
    await training.reconcile(studio)
    run = await run_of(studio, run.id)
    assert (run.phase, cluster.stops) == (RunPhase.SUCCEEDED, [])
    assert "fine_tune.cancelled.v1" not in told(run)


async def test_a_pending_one_is_stopped_once_it_has_started(studio: Studio, cluster: FakeTrainingCluster) -> None:
    studio.settings.training.lost_after_s = 60
    cluster.starts_as = RunState.PENDING
    id = await queued(studio)
    await training.reconcile(studio)
    await ask(studio, id)
    await training.reconcile(studio)
    run = await run_of(studio, id)
    assert (run.phase, token_file(studio, run).exists()) == (RunPhase.CANCELLING, False)
    cluster.start(run.submission_id)
    for _ in range(2):
        await training.reconcile(studio)
    assert cluster.runs[run.submission_id].state is RunState.STOPPED
    assert (await run_of(studio, id)).phase is RunPhase.CANCELLED


@pytest.mark.parametrize("trouble", ["is away", "denies", "never stops it"])
async def test_a_cluster_that_cannot_stop_it_is_not_waited_for_for_ever(
    studio: Studio, cluster: FakeTrainingCluster, trouble: str
) -> None:
    studio.settings.training.lost_after_s = 60
    run = await under_way(studio)
    await ask(studio, run.id)
    cluster.away, cluster.denies = trouble == "is away", "no" if trouble == "denies" else None
    if trouble == "never stops it":
        cluster.runs[run.submission_id].state = RunState.PENDING
    await training.reconcile(studio)
    assert (await run_of(studio, run.id)).phase is RunPhase.CANCELLING
    assert not token_file(studio, run).exists(), "it has to be fenced, whether the cluster answers or not"
    studio.settings.training.lost_after_s = 0.0
    await training.reconcile(studio)
    assert (await run_of(studio, run.id)).phase is RunPhase.CANCELLED


async def test_a_cluster_that_forgot_it_has_nothing_to_stop(studio: Studio, cluster: FakeTrainingCluster) -> None:
    run = await under_way(studio)
    await ask(studio, run.id)
    cluster.forget()
    await training.reconcile(studio)
    assert ((await run_of(studio, run.id)).phase, cluster.stops) == (RunPhase.CANCELLED, [])


async def test_an_attempt_that_is_cancelled_while_it_is_submitted_gets_no_trainer(
    studio: Studio, cluster: FakeTrainingCluster
) -> None:
    id = await queued(studio)
    begun = await studio.runs.change(ANYONE, id, lambda run: run.begin_attempt())
    assert begun is not None
    await ask(studio, id)
    await training.reconcile(studio)
    await training.submit(begun, studio)  # a watcher that was slow
    assert (cluster.submits, token_file(studio, begun).exists()) == (0, False)
    assert told(await run_of(studio, id)) == ["fine_tune.queued.v1", "fine_tune.cancelled.v1"]


async def test_checkpoints_of_attempts_before_go_too(studio: Studio) -> None:
    run = await under_way(studio)
    left = checkpoint(studio, run)
    await studio.runs.change(ANYONE, run.id, lambda r: r.lose(r.token, "gone", 9, interrupted=True))
    await ask(studio, run.id)
    await training.reconcile(studio)
    await training.reconcile(studio)
    run = await run_of(studio, run.id)
    assert (run.phase, run.attempt, left.exists()) == (RunPhase.CANCELLED, 1, False)


async def test_another_clients_cancel_is_refused(studio: Studio) -> None:
    run = await run_of(studio, await queued(studio))
    theirs = envelope(FineTuneCancelRequested(job_id=run.id), run.id, 2).model_copy(update={"client_code": "mallory"})
    with pytest.raises(Conflict, match="mallory"):
        run.cancel(theirs)


async def test_what_was_cancelled_stays_so(studio: Studio) -> None:
    id = await queued(studio)
    await ask(studio, id)
    run = await run_of(studio, id)
    late = [
        run.begin_attempt(), run.wait("x"), run.started(""), run.commit(""), run.cancelled(),
        run.fail("", code="internal", message="x"), run.lose("", "x", 3, interrupted=True),
        run.cancel(envelope(FineTuneCancelRequested(job_id=id), id, 2)),
    ]  # fmt: skip
    assert late == [None] * len(late)


async def test_a_claim_that_comes_after_its_cancel_changes_nothing(studio: Studio) -> None:
    request = envelope(fine_tune("job_" + "a" * 24), "job_" + "a" * 24)
    wanted = envelope(FineTuneCancelRequested(job_id=request.subject), request.subject, 2)
    with pytest.raises(Conflict, match="no request"):
        await consumer.cancel(wanted, studio)
    await studio.store.journal([request.stored(), wanted.stored()])
    await consumer.cancel(wanted, studio)
    await consumer.claim(request, studio)
    run = await run_of(studio, request.subject)
    assert (run.phase, run.cause.correlation_id) == (RunPhase.CANCELLED, CAUSE.correlation_id)
    assert told(run) == ["fine_tune.queued.v1", "fine_tune.cancelled.v1"]
