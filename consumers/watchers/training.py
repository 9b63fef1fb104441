"""Runs queued trainings on the cluster, follows their attempt folders, commits one artifact per job.

Every step is a compare-and-set on the run, then an idempotent effect; a crash between the two is repaired by the next turn.
"""

import asyncio
import errno
import time
from contextlib import AbstractContextManager
from pathlib import Path

import structlog

from consumers.watchers import apart, attempts, turn
from events.fine_tuning import FineTuneFailed, FineTuneProgressed, FineTuneSucceeded
from mini_studio.drivers.ports import RunReport, RunState
from mini_studio.errors import Refused, Unavailable
from mini_studio.records.record import ANYONE
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.wiring import Studio
from workloads.specs import Progress

log = structlog.get_logger(__name__)

IDLE_S = 10.0
LOG_LINES = 20
FAILURE_CODES = frozenset(FineTuneFailed.model_fields["code"].annotation.__args__)  # type: ignore[union-attr]
INTERRUPTED = frozenset({"fenced", "stopped"})
"""Codes of a trainer that was told to stop: the attempt is lost, the job is not."""


async def watch(studio: Studio) -> None:
    """Reconcile until cancelled."""
    await turn(lambda: reconcile(studio), studio.runs_changed)


async def reconcile(studio: Studio) -> float:
    """One turn over all runs that are not over; the seconds until the next one."""
    active = [
        run for phase in (RunPhase.COMMITTED, RunPhase.RUNNING, RunPhase.SUBMITTED) for run in await by(studio, phase)
    ]
    for run in active:
        with bound(run), apart():
            await follow(run, studio)
    queued = await by(studio, RunPhase.QUEUED)
    free = studio.settings.training.max_running - sum(run.phase is not RunPhase.COMMITTED for run in active)
    started = [run for run in queued[: max(0, free)] if await start(run, studio)]
    return studio.settings.training.poll_s if active or started else (1.0 if queued else IDLE_S)


async def by(studio: Studio, phase: RunPhase) -> list[TrainingRun]:
    return await studio.runs.where(ANYONE, phase=phase.value)


def bound(run: TrainingRun) -> AbstractContextManager[None]:
    return structlog.contextvars.bound_contextvars(
        request_id=run.cause.correlation_id, subject=run.id, attempt=run.attempt, event_id=run.cause.causation_id
    )


async def start(run: TrainingRun, studio: Studio) -> bool:
    """Take the run's next attempt and submit it, if the cluster is there to take it."""
    if not (await studio.cluster.status())["available"]:
        return False
    begun = await studio.runs.change(run.client_code, run.id, TrainingRun.begin_attempt)
    if begun is None:
        return False
    with bound(begun), apart():
        await submit(begun, studio)
    return True


async def submit(run: TrainingRun, studio: Studio) -> None:
    settings = studio.settings.training
    spec = attempts.train_spec(run, studio.settings)
    try:
        file = await asyncio.to_thread(attempts.prepare, spec)
    except OSError as error:
        code = "no_space" if error.errno == errno.ENOSPC else "internal"
        message = f"The attempt's folder cannot be written: {error}. Check the models folder's free space and rights, and submit again."
        await studio.runs.change(run.client_code, run.id, lambda r: r.fail(run.token, code=code, message=message))
        return
    try:
        await studio.cluster.submit(
            run.submission_id, file, cpus=1, gpus=0, metadata={"job_id": run.id, "attempt": str(run.attempt)}
        )
        log.info("training.submitted", submission_id=run.submission_id, threads=settings.threads)
    except Refused as error:
        message = f"Ray refused the training: {error.message}"
        await studio.runs.change(run.client_code, run.id, lambda r: r.fail(run.token, code="refused", message=message))
    except Unavailable as error:
        log.warning("training.submit_unknown", reason=error.message)


async def follow(run: TrainingRun, studio: Studio) -> None:
    """Report what the attempt wrote; commit it, fail it, or count it as lost."""
    folder = attempts.folder(run, studio.settings)
    if run.phase is RunPhase.COMMITTED:
        await announce(run, folder, studio)
        return
    lines, read = await asyncio.to_thread(attempts.read_progress, folder, run.reported_bytes)
    if lines and run.phase is RunPhase.SUBMITTED:
        run = await studio.runs.change(run.client_code, run.id, lambda r: r.started(run.token)) or run
    if await asyncio.to_thread(attempts.complete, folder, run):
        await report(run, lines, read, studio)
        if committed := await studio.runs.change(run.client_code, run.id, lambda r: r.commit(run.token)):
            await announce(committed, folder, studio)
        return
    failure = next((line for line in lines if line.kind == "failed"), None)
    if failure is not None:
        await end(run, failure, studio)
        return
    await report(run, lines, read, studio)
    await check_alive(run, folder, studio)


async def report(run: TrainingRun, lines: list[Progress], read: int, studio: Studio) -> None:
    """One event for all that is new."""
    known: dict[str, object] = {}
    for line in lines:
        known |= line.model_dump(include=set(FineTuneProgressed.model_fields), exclude_none=True)
    if known:
        event = FineTuneProgressed.model_validate({"job_id": run.id, "attempt": run.attempt, **known})
        await studio.runs.change(run.client_code, run.id, lambda r: r.progressed(run.token, event, read))
    elif read > run.reported_bytes:
        await studio.runs.change(run.client_code, run.id, lambda r: r.read_to(run.token, read))


async def announce(run: TrainingRun, folder: Path, studio: Studio) -> None:
    """Point the job's final path at the committed attempt, then say so."""
    manifest = await asyncio.to_thread(attempts.publish, folder, run)
    event = FineTuneSucceeded(
        job_id=run.id,
        attempt=run.attempt,
        fine_tuned_model=run.request.fine_tuned_model,
        fine_tuned_weights_path=str(attempts.final_path(run, studio.settings)),
        train_loss=manifest.train_loss,
        steps=manifest.steps,
        tokens=manifest.tokens,
    )
    await studio.runs.change(run.client_code, run.id, lambda r: r.succeed(event))
    log.info("training.succeeded", train_loss=manifest.train_loss)


async def end(run: TrainingRun, failure: Progress, studio: Studio) -> None:
    """The trainer said itself why it ended."""
    if failure.code in INTERRUPTED:
        await lose(run, "The trainer was stopped before it was done.", studio, interrupted=True)
        return
    code = failure.code if failure.code and failure.code in FAILURE_CODES else "internal"
    await fail(run, code, failure.message or "The trainer failed and gave no reason.", studio)


async def fail(run: TrainingRun, code: str, message: str, studio: Studio) -> None:
    tail = await studio.cluster.logs(run.submission_id, LOG_LINES)
    await studio.runs.change(
        run.client_code, run.id, lambda r: r.fail(run.token, code=code, message=message, log_tail=tail)
    )
    log.warning("training.failed", code=code, reason=message)


async def lose(run: TrainingRun, reason: str, studio: Studio, *, interrupted: bool) -> None:
    allowed = studio.settings.training.max_attempts
    tail = [] if interrupted else await studio.cluster.logs(run.submission_id, LOG_LINES)
    lost = await studio.runs.change(
        run.client_code, run.id, lambda r: r.lose(run.token, reason, allowed, interrupted=interrupted, log_tail=tail)
    )
    if lost is not None:
        log.warning("training.lost", reason=reason)
        await asyncio.to_thread(attempts.void, attempts.job_folder(run, studio.settings), run.token)
        studio.runs_changed.set()


async def check_alive(run: TrainingRun, folder: Path, studio: Studio) -> None:
    """Never trust the cluster's RUNNING alone: a trainer also has to give signs of life."""
    settings = studio.settings.training
    silent = time.time() - max(attempts.last_sign_of_life(folder), run.submitted_at)
    patience = settings.lost_after_s if run.phase is RunPhase.RUNNING else settings.start_timeout_s
    if silent < min(2.0, patience):
        return
    try:
        found = await studio.cluster.report(run.submission_id)
    except Unavailable:
        return
    present = await studio.runs.get(ANYONE, run.id)
    if present is None or present.token != run.token or attempts.has_more(folder, present):
        return  # it moved on while the cluster was asked
    await judge(run, found, silent > patience, studio)


async def judge(run: TrainingRun, found: RunReport, silent: bool, studio: Studio) -> None:
    match found.state:
        case RunState.LOST:
            await lose(
                run, "The cluster does not know the training any more (it was restarted).", studio, interrupted=True
            )
        case RunState.STOPPED:
            await lose(run, "The training was stopped on the cluster.", studio, interrupted=True)
        case RunState.FAILED if attempts.killed(found.message):
            await lose(run, f"The trainer was killed: {found.message}", studio, interrupted=False)
        case RunState.FAILED:
            message = f"The trainer ended without a result: {found.message} See log_tail."
            await fail(run, "internal", message, studio)
        case RunState.SUCCEEDED if silent:
            await fail(run, "internal", "The trainer ended well but left no complete artifact.", studio)
        case RunState.PENDING | RunState.RUNNING if silent:
            await studio.cluster.stop(run.submission_id)
            await lose(run, "The trainer gave no sign of life.", studio, interrupted=False)
