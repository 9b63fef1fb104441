"""What consumer `training` decides: one run per job. Pure transitions; the reconciler does the effects between them.

    requested -> queued -> submitted -> running -> committed -> succeeded
                   ^           |           |    \\-> failed
                   \\-----------+-----------/         (lost: the same job, a new attempt with a new token)

    queued -> cancelled, and submitted | running | queued again -> cancelling -> cancelled: by request, unless it was committed before

An attempt may write only while `current-attempt` names its token; its artifact is chosen by `commit`, a compare-and-set
that the token must still match. So a forgotten orphan can never publish a second model.
"""

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, Self

from pydantic import Field

from events.base import Envelope
from events.fine_tuning import (
    FineTuneCancelled,
    FineTuneCancelRequested,
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
)
from mini_studio.records.projection import timestamp
from mini_studio.records.record import Decider
from mini_studio.records.store import Collection

MAX_INTERRUPTIONS = 20
"""Attempts that a job may lose to restarts of the studio or of the cluster, beside those it loses by itself."""


class RunPhase(StrEnum):
    QUEUED = "queued"
    SUBMITTED = "submitted"
    RUNNING = "running"
    COMMITTED = "committed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (RunPhase.SUCCEEDED, RunPhase.FAILED, RunPhase.CANCELLED)

    @property
    def decided(self) -> bool:
        """Whether its end is chosen, announced or not."""
        return self.over or self in (RunPhase.COMMITTED, RunPhase.CANCELLING)


class TrainingRun(Decider):
    """The claim on one job: which attempt may go on, and how far it was reported."""

    COLLECTION: ClassVar = Collection("training_runs", listed_by=("phase",))

    request: FineTuneRequested
    phase: RunPhase = RunPhase.QUEUED
    attempt: int = 0
    token: str = ""
    submission_id: str = ""
    submitted_at: float = 0.0
    failures: int = Field(0, description="Attempts whose trainer was killed or fell silent.")
    reported_bytes: int = Field(0, description="How much of this attempt's progress file is in events.")
    cancelling_since: float = Field(0.0, description="Unix seconds; 0: nobody asked.")
    waits_for: str = Field(
        "", description="What keeps it in the queue, as it was announced last; empty: only its turn."
    )

    @classmethod
    def claim(cls, envelope: Envelope[FineTuneRequested]) -> Self:
        """The run of a requested job, queued."""
        run = cls(
            id=envelope.subject,
            client_code=envelope.client_code,
            created_at=timestamp(envelope.time),
            cause=envelope.follows(),
            request=envelope.data,
        )
        return run.deciding(FineTuneQueued(job_id=run.id, attempt=0))

    def begin_attempt(self) -> Self | None:
        """Take the next attempt, with a token of its own; nothing is announced before it runs."""
        if self.phase is not RunPhase.QUEUED:
            return None
        attempt = self.attempt + 1
        return self.model_copy(
            update={
                "phase": RunPhase.SUBMITTED,
                "attempt": attempt,
                "token": secrets.token_hex(16),
                "submission_id": f"{self.id}-{attempt}",
                "submitted_at": datetime.now(UTC).timestamp(),
                "reported_bytes": 0,
                "waits_for": "",
            }
        )

    def wait(self, reason: str) -> Self | None:
        """Say, once, what somebody has to mend before an attempt can start."""
        if self.phase is not RunPhase.QUEUED or reason == self.waits_for:
            return None
        event = FineTuneQueued(job_id=self.id, attempt=self.attempt, reason=reason)
        return self.deciding(event, waits_for=reason)

    def started(self, token: str) -> Self | None:
        """The attempt's trainer gave its first sign of life."""
        if self.phase is not RunPhase.SUBMITTED or token != self.token:
            return None
        event = FineTuneStarted(job_id=self.id, attempt=self.attempt, submission_id=self.submission_id)
        return self.deciding(event, phase=RunPhase.RUNNING)

    def progressed(self, token: str, event: FineTuneProgressed, reported_bytes: int) -> Self | None:
        """Report progress; `reported_bytes` moves with it, so that nothing is reported twice."""
        if self.phase is not RunPhase.RUNNING or token != self.token or reported_bytes <= self.reported_bytes:
            return None
        return self.deciding(event, reported_bytes=reported_bytes)

    def read_to(self, token: str, reported_bytes: int) -> Self | None:
        """What was read of the progress file had nothing to report."""
        if token != self.token or reported_bytes <= self.reported_bytes:
            return None
        return self.model_copy(update={"reported_bytes": reported_bytes})

    def commit(self, token: str) -> Self | None:
        """Choose this attempt's artifact, for ever, if the token still holds."""
        if self.phase is not RunPhase.RUNNING or token != self.token:
            return None
        return self.model_copy(update={"phase": RunPhase.COMMITTED})

    def succeed(self, event: FineTuneSucceeded) -> Self | None:
        """Announce the artifact; the job's final path points at it by now."""
        if self.phase is not RunPhase.COMMITTED:
            return None
        return self.deciding(event, phase=RunPhase.SUCCEEDED)

    def fail(self, token: str, **failure: Any) -> Self | None:
        """End the job for good."""
        if self.phase.decided or token != self.token:
            return None
        event = FineTuneFailed(job_id=self.id, attempt=self.attempt, **failure)
        return self.deciding(event, phase=RunPhase.FAILED)

    def lose(
        self, token: str, reason: str, max_failures: int, *, interrupted: bool, log_tail: Sequence[str] = ()
    ) -> Self | None:
        """The attempt is lost: queue another one, or end the job when it had its attempts. Its token is void at once.

        An attempt that was `interrupted` says nothing against the job: those count against `MAX_INTERRUPTIONS` alone.
        """
        if self.phase not in (RunPhase.SUBMITTED, RunPhase.RUNNING) or token != self.token:
            return None
        failures = self.failures + (not interrupted)
        if failures >= max_failures or self.attempt >= max_failures + MAX_INTERRUPTIONS:
            message = f"{reason} Gave up after {self.attempt} attempts."
            return self.fail(token, code="lost_worker", message=message, log_tail=list(log_tail))
        event = FineTuneQueued(job_id=self.id, attempt=self.attempt, reason=reason)
        return self.deciding(event, phase=RunPhase.QUEUED, token="", failures=failures)

    def cancel(self, envelope: Envelope[FineTuneCancelRequested]) -> Self | None:
        """Choose that there will be no artifact. At once where nothing ever ran; else its trainer has to be ended first."""
        self.check_owner(envelope)
        if self.phase.decided:
            return None
        cancelling = self.model_copy(
            update={"phase": RunPhase.CANCELLING, "cancelling_since": datetime.now(UTC).timestamp()}
        )
        return cancelling if self.attempt else cancelling.cancelled()

    def cancelled(self) -> Self | None:
        """Announce it: no trainer of the job may go on by now."""
        if self.phase is not RunPhase.CANCELLING:
            return None
        return self.deciding(FineTuneCancelled(job_id=self.id, attempt=self.attempt), phase=RunPhase.CANCELLED)
