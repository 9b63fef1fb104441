"""Fine-tuning jobs as GET returns them: a projection of `FineTune*` events."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from events.base import Envelope, Event
from events.fine_tuning import (
    FineTuneCancelled,
    FineTuneCancelRequested,
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
    Hyperparameters,
)
from events.types import JobStatus
from mini_studio.records.projection import Projection, begun, timestamp
from mini_studio.records.store import Collection


class JobDataset(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    rows: int
    tokens: int | None = None
    truncated_rows: int | None = None


class JobProgress(BaseModel):
    model_config = ConfigDict(frozen=True)

    message: str | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    train_loss: float | None = None
    eta_seconds: float | None = None


class JobError(BaseModel):
    model_config = ConfigDict(frozen=True)

    code: str
    message: str
    log_tail: list[str] = []


class Job(Projection):
    """One fine-tuning job."""

    COLLECTION: ClassVar = Collection("jobs", listed_by=("client_code",))

    model: str
    fine_tuned_model: str
    status: JobStatus = JobStatus.QUEUED
    hyperparameters: Hyperparameters
    dataset: JobDataset
    suffix: str | None = None
    deploy: bool = Field(False, description="Its result is served as soon as there is one.")
    metadata: dict[str, str] = Field(default_factory=dict)
    attempt: int = 0
    progress: JobProgress = JobProgress()
    started_at: str | None = None
    finished_at: str | None = None
    fine_tuned_weights_path: str | None = None
    error: JobError | None = None
    cancel_requested: bool = Field(False, description="Stays as it is in a job that came to another end before.")

    @property
    def cancelling(self) -> bool:
        """Whether it is about to be cancelled, and is not yet."""
        return self.cancel_requested and not self.status.final

    @classmethod
    def begin(cls, envelope: Envelope[Any]) -> Self | None:
        event = envelope.data
        if not isinstance(event, FineTuneRequested):
            return None
        at = timestamp(envelope.time)
        record = cls(
            id=envelope.subject, client_code=envelope.client_code, created_at=at, updated_at=at,
            cause=envelope.follows(),
            model=event.base_model, fine_tuned_model=event.fine_tuned_model, hyperparameters=event.hyperparameters,
            dataset=JobDataset(id=event.dataset.id, rows=event.dataset.rows), suffix=event.suffix,
            deploy=event.deploy, metadata=event.metadata,
        )  # fmt: skip
        return begun(record, envelope)

    def changes(self, event: Event, at: str) -> dict[str, Any]:
        if isinstance(event, FineTuneCancelRequested):
            return {"cancel_requested": True}  # whatever training has said by then: the two come in no fixed order
        if self.status.final:
            return {}
        match event:
            case FineTuneQueued():
                progress = JobProgress(message=event.reason)
                return {"status": JobStatus.QUEUED, "attempt": event.attempt, "progress": progress}
            case FineTuneStarted():
                started = self.started_at or at
                return {"status": JobStatus.RUNNING, "attempt": event.attempt, "started_at": started}
            case FineTuneProgressed():
                return {"progress": self._progress(event), "dataset": self._dataset(event)}
            case FineTuneSucceeded():
                return self._succeeded(event, at)
            case FineTuneFailed():
                error = JobError(code=event.code, message=event.message, log_tail=event.log_tail)
                return {"status": JobStatus.FAILED, "attempt": event.attempt, "error": error, "finished_at": at}
            case FineTuneCancelled():
                progress = self.progress.model_copy(update={"message": None, "eta_seconds": None})
                return {
                    "status": JobStatus.CANCELLED,
                    "attempt": event.attempt,
                    "progress": progress,
                    "finished_at": at,
                }
        return {}

    def _progress(self, event: FineTuneProgressed) -> JobProgress:
        known = event.model_dump(include=set(JobProgress.model_fields), exclude_none=True)
        return self.progress.model_copy(update={"message": None, **known})

    def _dataset(self, event: FineTuneProgressed) -> JobDataset:
        known = event.model_dump(include={"tokens", "truncated_rows"}, exclude_none=True)
        return self.dataset.model_copy(update=known)

    def _succeeded(self, event: FineTuneSucceeded, at: str) -> dict[str, Any]:
        done = {"step": event.steps, "total_steps": event.steps, "train_loss": event.train_loss, "eta_seconds": 0.0}
        return {
            "status": JobStatus.SUCCEEDED,
            "attempt": event.attempt,
            "progress": self.progress.model_copy(update={**done, "message": None}),
            "dataset": self.dataset.model_copy(update={"tokens": event.tokens}),
            "fine_tuned_weights_path": event.fine_tuned_weights_path,
            "finished_at": at,
        }
