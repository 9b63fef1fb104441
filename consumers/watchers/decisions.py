"""What the watchers make of what they see. Pure functions: they look before (`observe`), and act after.

tests/faults/model runs them, with everything around them, through every order of steps and crashes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from events.fine_tuning import FineTuneFailed, FineTuneProgressed
from events.types import DeploymentStatus
from mini_studio.drivers.ports import ReleaseReport, ReleaseState, RunReport, RunState
from mini_studio.records.releases import Release
from mini_studio.records.training_runs import RunPhase, TrainingRun
from workloads.specs import Progress

FAILURE_CODES = frozenset(FineTuneFailed.model_fields["code"].annotation.__args__)  # type: ignore[union-attr]
INTERRUPTED = frozenset({"fenced", "stopped"})
"""Codes of a trainer that was told to stop: the attempt is lost, the job is not."""
LOST_WORKER = "lost_worker"
"""Code of a trainer one of whose workers has gone: the next attempt may have more luck."""
KILLED_BY_SIGNAL = ("SIGKILL", "SIGTERM", "signal", "exit code -", "exit code 137", "exit code 143")


@dataclass(frozen=True)
class Attempt:
    """What one turn saw of a run's attempt: the cluster first, its folder last."""

    lines: Sequence[Progress] = ()
    """What the trainer wrote since the last report."""
    read: int = 0
    """Where those lines end."""
    complete: bool = False
    silent: bool = False
    """No sign of life for longer than the trainer is given."""
    reported: RunReport | None = None
    """What the cluster says; None: it was not asked, because the trainer shows life, or it did not answer."""


@dataclass(frozen=True)
class Start:
    """The trainer showed its first sign of life."""


@dataclass(frozen=True)
class Report:
    """Say in one event all that is new; None: nothing of it is worth an event."""

    event: FineTuneProgressed | None
    read: int


@dataclass(frozen=True)
class Commit:
    """Choose this attempt's artifact."""


@dataclass(frozen=True)
class Announce:
    """Publish the artifact that was chosen."""


@dataclass(frozen=True)
class Fail:
    """End the job."""

    code: str
    message: str


@dataclass(frozen=True)
class Lose:
    """Give the attempt up, not the job."""

    reason: str
    interrupted: bool
    stop: bool = False
    """The cluster may still run it."""


Action = Start | Report | Commit | Announce | Fail | Lose


def next_actions(run: TrainingRun, seen: Attempt) -> list[Action]:
    """What to do about a run that is under way, in this order. Every action is void when the run has moved on."""
    if run.phase is RunPhase.COMMITTED:
        return [Announce()]
    started: list[Action] = [Start()] if seen.lines and run.phase is RunPhase.SUBMITTED else []
    if seen.complete:
        return [*started, *_report(run, seen), Commit()]
    failure = next((line for line in seen.lines if line.kind == "failed"), None)
    if failure is not None:
        return [*started, _ended(failure)]
    # a trainer that has just said something is not judged by what the cluster said before
    return [*started, *_report(run, seen)] or _judged(seen)


def _report(run: TrainingRun, seen: Attempt) -> list[Action]:
    if seen.read <= run.reported_bytes:
        return []
    known: dict[str, object] = {}
    for line in seen.lines:
        known |= line.model_dump(include=set(FineTuneProgressed.model_fields), exclude_none=True)
    about = {"job_id": run.id, "attempt": run.attempt}
    return [Report(FineTuneProgressed.model_validate(about | known) if known else None, seen.read)]


def _ended(failure: Progress) -> Action:
    """The trainer said itself why it ended."""
    if failure.code in INTERRUPTED:
        return Lose("The trainer was stopped before it was done.", interrupted=True)
    if failure.code == LOST_WORKER:
        return Lose(failure.message or "A worker of the training was lost.", interrupted=False)
    code = failure.code if failure.code and failure.code in FAILURE_CODES else "internal"
    return Fail(code, failure.message or "The trainer failed and gave no reason.")


def _judged(seen: Attempt) -> list[Action]:
    """Never trust the cluster's RUNNING alone: a trainer also has to give signs of life."""
    if seen.reported is None:
        return []
    message = seen.reported.message
    match seen.reported.state:
        case RunState.LOST:
            return [Lose("The cluster does not know the training any more (it was restarted).", interrupted=True)]
        case RunState.STOPPED:
            return [Lose("The training was stopped on the cluster.", interrupted=True)]
        case RunState.FAILED if killed(message):
            return [Lose(f"The trainer was killed: {message}", interrupted=False)]
        case RunState.FAILED:
            return [Fail("internal", f"The trainer ended without a result: {message} See log_tail.")]
        case RunState.SUCCEEDED if seen.silent:
            return [Fail("internal", "The trainer ended well but left no complete artifact.")]
        case RunState.PENDING | RunState.RUNNING if seen.silent:
            return [Lose("The trainer gave no sign of life.", interrupted=False, stop=True)]
    return []


def killed(message: str) -> bool:
    """Whether the cluster says that the trainer's process was killed, rather than that it failed."""
    return any(sign in message for sign in KILLED_BY_SIGNAL)


def reported(
    release: Release, generation: int, seen: ReleaseReport | None, *, now: float, patience_s: float
) -> Release | None:
    """The release after `generation` was applied and then looked at; None when there is nothing new to say."""
    message = (seen.message if seen else "") or None
    present = release.applied(generation, now, message) or release
    if seen is not None and seen.generation == generation:
        present = _as_seen(present, seen, now) or present
        waited = now - present.applied_at
        starting = seen.state is ReleaseState.STARTING and present.status is not DeploymentStatus.READY
        if starting and present.applied_at and waited > patience_s:
            late = f"It was not ready {patience_s:.0f} s after it was started. Last seen: {seen.message or 'nothing'}"
            present = present.fail(generation, late) or present
    return None if present is release else present


def _as_seen(release: Release, seen: ReleaseReport, now: float) -> Release | None:
    match seen.state:
        case ReleaseState.READY:
            return release.ready(seen.generation, seen.endpoints, seen.replicas, seen.message or None)
        case ReleaseState.FAILED:
            return release.fail(seen.generation, seen.message)
        case ReleaseState.STARTING if release.may_sleep and release.status is DeploymentStatus.READY:
            # It wakes: requests wait for it at the gateways, which know its address.
            return release.ready(seen.generation, release.endpoints, 0, seen.message or None)
        case ReleaseState.STARTING:
            return release.restarting(seen.generation, now, seen.message or None)
