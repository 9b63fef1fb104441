"""REST models of the OpenAI dialect, field for field as the `openai` package (3.57) has them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, field_validator

from events.types import ClientCode, ModelName, Suffix
from schemas.fine_tuning import MAX_BATCH_SIZE


def unix(timestamp: str) -> int:
    """Unix seconds of a record's RFC 3339 time."""
    return int(datetime.fromisoformat(timestamp).timestamp())


class ErrorObject(BaseModel):
    message: str = Field(description="What is wrong and what to do.")
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="The field that is wrong.")
    code: str | None


class OpenAIError(BaseModel):
    """Every failure below `/v1`."""

    error: ErrorObject


FAILURES: dict[int | str, dict[str, Any]] = {"4XX": {"model": OpenAIError}, "5XX": {"model": OpenAIError}}


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When it was deployed, Unix seconds.")
    owned_by: str = Field(description="The client, or `mini-studio` for what all clients share.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: bool = True


class FileObject(BaseModel):
    """A dataset."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["uploaded", "processed", "error"] = Field(
        description="`processed` once both stored copies were read back; `error` where one is damaged."
    )
    status_details: str | None
    expires_at: int | None = None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class Page(BaseModel):
    """`after=<last_id>` gives the next page while `has_more`."""

    object: Literal["list"] = "list"
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileList(Page):
    data: list[FileObject]


def _auto(value: object) -> object:
    return None if value == "auto" else value


AutoCount = BeforeValidator(_auto, json_schema_input_type=Literal["auto"] | int | None)
AutoRate = BeforeValidator(_auto, json_schema_input_type=Literal["auto"] | float | None)


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class AskedHyperparameters(Asked):
    """`auto`, or left out: the defaults of the legacy fine-tunes API, which the answer shows."""

    n_epochs: Annotated[Annotated[int, Field(ge=1, le=1000)] | None, AutoCount] = None
    batch_size: Annotated[Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)] | None, AutoCount] = None
    learning_rate_multiplier: Annotated[Annotated[float, Field(gt=0, le=100)] | None, AutoRate] = None


class AskedSupervised(Asked):
    hyperparameters: AskedHyperparameters | None = None


class AskedMethod(Asked):
    """Only supervised training."""

    type: Literal["supervised"]
    supervised: AskedSupervised | None = None


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]


class FineTuningJobCreate(Asked):
    """Body of `POST /v1/fine_tuning/jobs`."""

    model: ModelName = Field(description="Base model: a name of `mini-studio models list`.", examples=["tiny-llama"])
    training_file: str = Field(min_length=1, max_length=200, description="Id of a file.")
    method: AskedMethod | None = None
    hyperparameters: AskedHyperparameters | None = Field(None, description="As `method.supervised.hyperparameters`.")
    suffix: Suffix | None = Field(None, description="Last part of the fine-tuned model's name.")
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="Same seed, same batches.")
    metadata: Metadata | None = None
    validation_file: Any = Field(None, description="Not supported.")
    integrations: Any = Field(None, description="Not supported.")
    client_code: ClientCode | None = Field(None, description="The client, where no header names it.")

    @field_validator("validation_file", "integrations")
    @classmethod
    def _not_supported(cls, value: object) -> None:
        if value not in (None, []):
            raise ValueError("is not supported; leave it out")

    def asked(self) -> AskedHyperparameters:
        """The hyperparameters, wherever they stand; the newer place first."""
        supervised = self.method.supervised if self.method else None
        return (supervised and supervised.hyperparameters) or self.hyperparameters or AskedHyperparameters()


class JobHyperparameters(BaseModel):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class Supervised(BaseModel):
    hyperparameters: JobHyperparameters


class Method(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised


class JobFailure(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel):
    """A job; one that was created here deploys its result, and has succeeded when that was tried."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None = Field(description="The name to ask; null until the job succeeded.")
    organization_id: str = Field(description="The client.")
    status: Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
    error: JobFailure | None
    hyperparameters: JobHyperparameters
    method: Method
    seed: int
    trained_tokens: int | None
    training_file: str
    validation_file: None = None
    result_files: list[str] = []
    integrations: list[str] = []
    metadata: dict[str, str] | None


class FineTuningJobList(Page):
    data: list[FineTuningJob]


class FineTuningJobEvent(BaseModel):
    """One event of the log, as a line for people; those with a step have numbers in `data`."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None


class FineTuningJobEventList(Page):
    data: list[FineTuningJobEvent]


class FineTuningJobCheckpoint(BaseModel):
    """A checkpoint that can be asked. The studio's own serve the next attempt alone, and go with their job."""

    id: str


class FineTuningJobCheckpointList(Page):
    data: list[FineTuningJobCheckpoint]
