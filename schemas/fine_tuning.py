"""REST models of datasets and fine-tuning jobs. Bounds and defaults are those of OpenAI's legacy fine-tunes API."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from events.fine_tuning import Hyperparameters, Lora
from events.types import ClientCode, DatasetFormat, Method, ModelName, Suffix

DEFAULT_EPOCHS = 4
DEFAULT_PROMPT_LOSS_WEIGHT = 0.01
BATCH_SHARE_OF_ROWS = 0.002
MAX_BATCH_SIZE = 256


class FineTuningJobRequest(BaseModel):
    """Body of `POST /fine_tuning/submit-finetune`. What is left out gets the legacy defaults, shown in the answer."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: ModelName = Field(description="Base model: a name of `mini-studio models list`.", examples=["tiny-llama"])
    client_code: ClientCode = Field(examples=["acme"])
    dataset_filename: str = Field(
        min_length=1, max_length=2048, description="Dataset id, DFS path or S3 key, as the upload answered them."
    )
    n_epochs: int = Field(DEFAULT_EPOCHS, ge=1, le=1000, description="Passes over the dataset.")
    batch_size: int | None = Field(
        None, ge=1, le=MAX_BATCH_SIZE, description="Rows a step; default 0.2 % of the rows, at least 1, at most 256."
    )
    learning_rate_multiplier: float | None = Field(
        None, gt=0, le=100, description="Times the method's reference rate; default 0.05, 0.1 or 0.2 by batch size."
    )
    prompt_loss_weight: float = Field(
        DEFAULT_PROMPT_LOSS_WEIGHT, ge=0, le=1, description="Weight of prompt tokens in the loss; completions have 1."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Same seed, same batches.")
    suffix: Suffix | None = Field(
        None, description="Last part of the fine-tuned model's name; default: of the job's id."
    )
    method: Method | None = Field(None, description="Default: lora for models over a size setting, else full.")
    lora: Lora | None = Field(None, description="LoRA settings; null for the defaults.")

    @model_validator(mode="after")
    def _lora_needs_its_method(self) -> "FineTuningJobRequest":
        if self.lora is not None and self.method == "full":
            raise ValueError("lora: cannot be given with method full; leave one of them out")
        return self

    def resolve(self, rows: int, default_method: Method) -> Hyperparameters:
        """Every hyperparameter, none left to a later default."""
        batch_size = self.batch_size or default_batch_size(rows)
        method: Method = "lora" if self.lora is not None else self.method or default_method
        return Hyperparameters(
            n_epochs=self.n_epochs,
            batch_size=batch_size,
            learning_rate_multiplier=self.learning_rate_multiplier or default_learning_rate_multiplier(batch_size),
            prompt_loss_weight=self.prompt_loss_weight,
            seed=self.seed,
            method=method,
            lora=(self.lora or Lora()) if method == "lora" else None,
        )


def default_batch_size(rows: int) -> int:
    """About 0.2 % of the rows, at least 1, at most 256 (OpenAI's legacy fine-tunes API)."""
    return max(1, min(MAX_BATCH_SIZE, round(rows * BATCH_SHARE_OF_ROWS)))


def default_learning_rate_multiplier(batch_size: int) -> float:
    """0.05, 0.1 or 0.2: larger batches bear larger rates (OpenAI's legacy fine-tunes API)."""
    if batch_size < 16:
        return 0.05
    return 0.1 if batch_size < 64 else 0.2


class DatasetUploadResponse(BaseModel):
    """Answer of `POST /fine_tuning/upload-dataset/{client_code}`."""

    ok: bool = True
    dataset_id: str
    dataset_dfs: str
    dataset_s3: str
    size_bytes: int
    sha256: str
    format: DatasetFormat
    rows: int
    filename: str | None


class DatasetView(BaseModel):
    """An uploaded dataset."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    client_code: str
    filename: str | None
    dfs_path: str = Field(description="The `dataset_dfs` of its upload's answer.")
    s3_uri: str = Field(description="The `dataset_s3` of its upload's answer.")
    size_bytes: int
    sha256: str
    format: DatasetFormat
    rows: int
    state: str = Field(
        description="uploaded; verified or damaged once both copies were read back; deleted in the answer to DELETE."
    )
    message: str | None = Field(description="Which copy is damaged, and what to do.")
    characters: int
    longest_line_bytes: int
    tokens_estimated: int | None = Field(description="Characters / 4; known once it is verified.")
    created_at: str
    updated_at: str


class DatasetResponse(BaseModel):
    ok: bool = True
    dataset: DatasetView


class DatasetListResponse(BaseModel):
    """Newest first; `after=<last id>` gives the next page while `has_more`."""

    ok: bool = True
    datasets: list[DatasetView]
    has_more: bool
    last_id: str | None


class JobDatasetView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    rows: int
    tokens: int | None = Field(description="By the base model's tokenizer; known once the job prepared it.")
    truncated_rows: int | None


class JobProgressView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    message: str | None
    step: int | None
    total_steps: int | None
    epoch: float | None
    train_loss: float | None
    eta_seconds: float | None


class JobErrorView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    code: str
    message: str = Field(description="What happened and what to do.")
    log_tail: list[str]


class JobView(BaseModel):
    """A fine-tuning job."""

    model_config = ConfigDict(from_attributes=True, protected_namespaces=())

    id: str
    client_code: str
    model: str
    status: str = Field(description="queued, running, succeeded, failed or cancelled.")
    cancelling: bool = Field(description="Its end was asked for, and is still to come.")
    hyperparameters: Hyperparameters
    dataset: JobDatasetView
    attempt: int
    progress: JobProgressView
    suffix: str | None
    fine_tuned_model: str = Field(description="The name it is asked for by, once deployed.")
    fine_tuned_weights_path: str | None = Field(description="What `deploy/fine_tuned` takes; null until it succeeded.")
    error: JobErrorView | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    updated_at: str


class JobResponse(BaseModel):
    ok: bool = True
    job: JobView


class JobListResponse(BaseModel):
    """Newest first; `after=<last id>` gives the next page while `has_more`."""

    ok: bool = True
    jobs: list[JobView]
    has_more: bool
    last_id: str | None


class ClusterStatusResponse(BaseModel):
    ok: bool = True
    status: dict[str, Any]


class ErrorResponse(BaseModel):
    """Every failure of every endpoint."""

    ok: bool = False
    error: str = Field(
        description="What is wrong and what to do; validation errors name the field, dataset errors the line."
    )
    code: str
    details: list[dict[str, Any]] = Field(default_factory=list)
    request_id: str | None = None
