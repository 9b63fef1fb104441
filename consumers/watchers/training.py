"""Runs queued trainings on the cluster, follows their attempt folders, commits one artifact per job.

Every step is a compare-and-set on the run, then an idempotent effect; a crash between the two is repaired by the next turn.
"""

import asyncio
import contextlib
import errno
import time
from typing import Any

import structlog

from consumers.watchers import apart, attempts, turn
from consumers.watchers.decisions import Action, Announce, Attempt, Commit, Fail, Lose, Report, Start, next_actions
from events.fine_tuning import FineTuneSucceeded
from mini_studio.drivers.ports import RunState
from mini_studio.errors import Denied, Refused, Unavailable
from mini_studio.records.record import ANYONE, Change
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.wiring import Studio

log = structlog.get_logger(__name__)

ACTIVE = (RunPhase.COMMITTED, RunPhase.CANCELLING, RunPhase.RUNNING, RunPhase.SUBMITTED)
IDLE_S = 10.0
LOG_LINES = 20


async def watch(studio: Studio) -> None:
    """Reconcile until cancelled."""
    await turn(lambda: reconcile(studio), studio.runs_changed)


async def reconcile(studio: Studio) -> float:
    """One turn over all runs that are not over; the seconds until the next one."""
    active = [run for phase in ACTIVE for run in await by(studio, phase)]
    for run in active:
        with bound(run), apart():
            await follow(run, studio)
    running = sum(run.phase is not RunPhase.COMMITTED for run in active)
    free = max(0, studio.settings.training.max_running - running)
    # The queue may be long, and it is looked at with every job that comes: no more of it than may start, or tells that there is one.
    queued = await by(studio, RunPhase.QUEUED, limit=max(1, free))
    started = 0
    for run in queued[:free]:
        with bound(run), apart():
            started += await start(run, studio, running + started)
    return studio.settings.training.poll_s if active or started else (1.0 if queued else IDLE_S)


async def by(studio: Studio, phase: RunPhase, *, limit: int = 1000) -> list[TrainingRun]:
    return await studio.runs.where(ANYONE, limit=limit, phase=phase.value)


def bound(run: TrainingRun) -> contextlib.AbstractContextManager[None]:
    return structlog.contextvars.bound_contextvars(
        request_id=run.cause.correlation_id, subject=run.id, attempt=run.attempt, event_id=run.cause.causation_id
    )


async def start(run: TrainingRun, studio: Studio, running: int) -> bool:
    """Take the run's next attempt and submit it, if the cluster has room for it beside those that are running.

    Ray would keep what it has no room for, for ever or until it fails: the queue is here.
    """
    try:
        if not await studio.cluster.has_room(attempts.workers(studio.settings), running=running):
            return False
    except (Refused, Denied) as error:
        reason = error.message
        if await change(run, studio, lambda r: r.wait(reason)):
            log.warning("training.waits", reason=reason)
        return False
    except Unavailable:
        return False
    begun = await change(run, studio, lambda r: r.begin_attempt())
    if begun is None:
        return False
    with bound(begun), apart():
        await submit(begun, studio)
    return True


async def submit(run: TrainingRun, studio: Studio) -> None:
    spec = attempts.train_spec(run, studio.settings)
    try:
        file = await asyncio.to_thread(attempts.prepare, spec)
    except OSError as error:
        code = "no_space" if error.errno == errno.ENOSPC else "internal"
        message = f"The attempt's folder cannot be written: {error}. Check the models folder's free space and rights, and submit again."
        await end(run, studio, code=code, message=message)
        return
    if not await current(run, studio):
        # Behind who voided the attempt, its token was written again; nobody would look for its trainer.
        await asyncio.to_thread(attempts.void, spec.job_dir, run.token)
        return
    try:
        await studio.cluster.submit(
            run.submission_id,
            file,
            workers=attempts.workers(studio.settings),
            metadata={"job_id": run.id, "attempt": str(run.attempt)},
        )
        log.info("training.submitted", submission_id=run.submission_id, workers=spec.workers, threads=spec.threads)
    except Refused as error:
        message = f"Ray refused the training: {error.message}"
        await end(run, studio, code="refused", message=message)
    except Unavailable as error:
        log.warning("training.submit_unknown", reason=error.message)


async def current(run: TrainingRun, studio: Studio) -> bool:
    """Whether the attempt is still the one to submit: by now it may be cancelled, or another watcher has given it up."""
    present = await studio.runs.get(run.client_code, run.id)
    return present is not None and (present.phase, present.token) == (RunPhase.SUBMITTED, run.token)


async def follow(run: TrainingRun, studio: Studio) -> None:
    """Look at the attempt, decide, act: report what it wrote; commit it, fail it, or count it as lost."""
    if run.phase is RunPhase.CANCELLING:
        await cancel(run, studio)
        return
    seen = Attempt() if run.phase is RunPhase.COMMITTED else await observe(run, studio)
    for action in next_actions(run, seen):
        await act(action, run, studio)


async def observe(run: TrainingRun, studio: Studio) -> Attempt:
    """The cluster is asked before the folder is read: whatever it says to have ended has written its last by then."""
    settings, folder = studio.settings.training, attempts.folder(run, studio.settings)
    silent_s = time.time() - max(await asyncio.to_thread(attempts.last_sign_of_life, folder), run.submitted_at)
    patience_s = settings.lost_after_s if run.phase is RunPhase.RUNNING else settings.start_timeout_s
    reported = None
    if silent_s >= min(2.0, patience_s):
        try:
            reported = await studio.cluster.report(run.submission_id)
        except Denied as error:
            log.warning("training.denied", reason=error.message)
        except Unavailable:
            pass
    lines, read = await asyncio.to_thread(attempts.read_progress, folder, run.reported_bytes)
    complete = await asyncio.to_thread(attempts.complete, folder, run)
    return Attempt(lines, read, complete, silent_s > patience_s, reported)


async def act(action: Action, run: TrainingRun, studio: Studio) -> None:
    match action:
        case Start():
            await change(run, studio, lambda r: r.started(run.token))
        case Report(event, read):
            await change(
                run, studio, lambda r: r.progressed(run.token, event, read) if event else r.read_to(run.token, read)
            )
        case Commit():
            if committed := await change(run, studio, lambda r: r.commit(run.token)):
                await announce(committed, studio)
        case Announce():
            await announce(run, studio)
        case Fail(code, message):
            await fail(run, code, message, studio)
        case Lose():
            await lose(run, action, studio)


async def change(run: TrainingRun, studio: Studio, transition: Change[TrainingRun]) -> TrainingRun | None:
    return await studio.runs.change(run.client_code, run.id, transition)


async def announce(run: TrainingRun, studio: Studio) -> None:
    """Point the job's final path at the committed attempt, then say so."""
    manifest = await asyncio.to_thread(attempts.publish, attempts.folder(run, studio.settings), run)
    await asyncio.to_thread(attempts.remove_checkpoints, attempts.job_folder(run, studio.settings))
    event = FineTuneSucceeded(
        job_id=run.id,
        attempt=run.attempt,
        fine_tuned_model=run.request.fine_tuned_model,
        fine_tuned_weights_path=str(attempts.final_path(run, studio.settings)),
        train_loss=manifest.train_loss,
        steps=manifest.steps,
        tokens=manifest.tokens,
    )
    await change(run, studio, lambda r: r.succeed(event))
    log.info("training.succeeded", train_loss=manifest.train_loss)


async def fail(run: TrainingRun, code: str, message: str, studio: Studio) -> None:
    tail = await studio.cluster.logs(run.submission_id, LOG_LINES)
    await end(run, studio, code=code, message=message, log_tail=tail)


async def end(run: TrainingRun, studio: Studio, **failure: Any) -> None:
    if await change(run, studio, lambda r: r.fail(run.token, **failure)) is not None:
        await asyncio.to_thread(attempts.remove_checkpoints, attempts.job_folder(run, studio.settings))
        log.warning("training.failed", code=failure["code"], reason=failure["message"])


async def lose(run: TrainingRun, lost: Lose, studio: Studio) -> None:
    if lost.stop:
        await studio.cluster.stop(run.submission_id)
    allowed, reason, interrupted = studio.settings.training.max_attempts, lost.reason, lost.interrupted
    tail = [] if interrupted else await studio.cluster.logs(run.submission_id, LOG_LINES)
    done = await change(
        run, studio, lambda r: r.lose(run.token, reason, allowed, interrupted=interrupted, log_tail=tail)
    )
    if done is not None:
        log.warning("training.lost", reason=reason)
        job_folder = attempts.job_folder(run, studio.settings)
        await asyncio.to_thread(attempts.give_up, job_folder, run.token, done.phase.over)
        studio.runs_changed.set()


async def cancel(run: TrainingRun, studio: Studio) -> None:
    """Take the token from whoever trains for the job, have it stopped, remove what it made, and say so."""
    job_folder = attempts.job_folder(run, studio.settings)
    await asyncio.to_thread(attempts.fence, job_folder)
    if not await ended(run, studio):
        return
    await asyncio.to_thread(attempts.remove_artifacts, job_folder)
    if await change(run, studio, lambda r: r.cancelled()) is not None:
        log.info("training.cancelled")


async def ended(run: TrainingRun, studio: Studio) -> bool:
    """Whether the cluster has ended the training. It need not answer for ever: without its token a trainer ends by itself.

    It is asked to stop it at every turn: one that is pending is stopped only once it has started.
    """
    given_up = time.time() - run.cancelling_since > studio.settings.training.lost_after_s
    try:
        report = await studio.cluster.report(run.submission_id)
        if report.state in (RunState.PENDING, RunState.RUNNING):
            await studio.cluster.stop(run.submission_id)
            return given_up
    except (Refused, Unavailable) as error:
        log.warning("training.cannot_stop", reason=error.message, given_up=given_up)
        return given_up
    return True
