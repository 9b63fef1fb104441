"""Events of a fine-tune; the aggregate is the job's id."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from events.base import Event, Source
from events.topics import Topic
from events.types import DatasetId, JobId, Method, ModelName, Sha256


class Lora(BaseModel):
    """Low-rank adaptation (Hu et al. 2021): rank `r`, the update is scaled by `alpha / r`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(16, ge=1, le=256)
    alpha: int = Field(32, ge=1, le=1024)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class Hyperparameters(BaseModel):
    """As resolved: no field is left to a later default."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    n_epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate_multiplier: float = Field(gt=0)
    prompt_loss_weight: float = Field(ge=0)
    seed: int = Field(ge=0)
    method: Method
    lora: Lora | None = None


class DatasetRef(BaseModel):
    """The dataset a job trains on, with all that training needs of it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: DatasetId
    dfs_path: str
    sha256: Sha256
    rows: int


class FineTuneEvent(Event):
    TOPIC: ClassVar = Topic.FINE_TUNES

    job_id: JobId


class FineTuneRequested(FineTuneEvent):
    """A client asked for a base model to be fine-tuned on a dataset."""

    TYPE: ClassVar = "fine_tune.requested.v1"
    SOURCE: ClassVar = Source.API

    base_model: ModelName
    fine_tuned_model: ModelName
    dataset: DatasetRef
    hyperparameters: Hyperparameters
    suffix: str | None = None
    deploy: bool = Field(False, description="Serve the result as soon as there is one, without being asked again.")
    metadata: dict[str, str] = Field(default_factory=dict, description="The client's own notes; the studio reads none.")


class FineTuneCancelRequested(FineTuneEvent):
    """A client wants the job no more. It ends with `FineTuneCancelled`, unless it had come to another end before."""

    TYPE: ClassVar = "fine_tune.cancel_requested.v1"
    SOURCE: ClassVar = Source.API


class TrainingEvent(FineTuneEvent):
    SOURCE: ClassVar = Source.TRAINING

    attempt: int = Field(ge=0, description="0 until the first attempt is submitted.")


class FineTuneQueued(TrainingEvent):
    """The request was claimed; it waits for resources, or for another attempt."""

    TYPE: ClassVar = "fine_tune.queued.v1"

    reason: str | None = Field(
        None, description="Why it is queued again, when it was running before; or what keeps it from starting."
    )


class FineTuneStarted(TrainingEvent):
    """The trainer of this attempt runs."""

    TYPE: ClassVar = "fine_tune.started.v1"

    submission_id: str


class FineTuneProgressed(TrainingEvent):
    """How far the attempt is. Fields that are not known yet are null."""

    TYPE: ClassVar = "fine_tune.progressed.v1"

    message: str | None = None
    tokens: int | None = None
    truncated_rows: int | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    train_loss: float | None = None
    eta_seconds: float | None = None


class FineTuneSucceeded(TrainingEvent):
    """One attempt's artifact was committed; there will never be another for this job."""

    TYPE: ClassVar = "fine_tune.succeeded.v1"

    fine_tuned_model: ModelName
    fine_tuned_weights_path: str
    train_loss: float
    steps: int
    tokens: int


class FineTuneFailed(TrainingEvent):
    """The job failed for good."""

    TYPE: ClassVar = "fine_tune.failed.v1"

    code: Literal[
        "out_of_memory", "bad_row", "base_model", "dataset_changed", "no_space", "lost_worker", "refused", "internal"
    ]
    message: str = Field(description="What happened and what to do.")
    log_tail: list[str] = Field(default_factory=list, description="Last lines of the trainer's log.")


class FineTuneCancelled(TrainingEvent):
    """The job was ended because a client asked for it; there is no model, and there will never be one."""

    TYPE: ClassVar = "fine_tune.cancelled.v1"
