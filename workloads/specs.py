"""What the studio hands to a workload and what the workload leaves behind: the files both sides read.

A job's folder, `<models root>/<client>/<job id>/`:

    current-attempt               the fencing token of the attempt that may go on (written by the studio)
    attempts/<n>/spec.json        `TrainSpec` (written by the studio)
    attempts/<n>/progress.jsonl   one `Progress` a line (written by the trainer, appended)
    attempts/<n>/heartbeat        touched by the trainer every few seconds
    attempts/<n>/weights/         the model, loadable by transformers alone
    attempts/<n>/checkpoints/     `step-<step>.pt`, from which a later attempt goes on, and then `step-<step>.json`, its `Checkpoint`
    attempts/<n>/manifest.json    `Manifest`, written last and atomically: its presence means the attempt is complete
    model -> attempts/<n>/weights the committed result (linked by the studio)
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

CURRENT_ATTEMPT = "current-attempt"
SPEC = "spec.json"
PROGRESS = "progress.jsonl"
HEARTBEAT = "heartbeat"
MANIFEST = "manifest.json"
WEIGHTS = "weights"
CHECKPOINTS = "checkpoints"
COMMITTED = "model"
BASE_MODELS = ".base"
"""Folder of the base models under the models root; a client code cannot start with a dot."""


def attempt_dir(job_dir: Path, attempt: int) -> Path:
    return job_dir / "attempts" / str(attempt)


class LoraSpec(BaseModel):
    """Low-rank adaptation (Hu et al. 2021): `r` is the rank, the update is scaled by `alpha / r`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, le=256)
    alpha: int = Field(default=32, ge=1, le=1024)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class TrainSpec(BaseModel):
    """One attempt at one fine-tuning job."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    attempt: int = Field(ge=1)
    token: str = Field(description="Fencing token; the trainer stops when `current-attempt` holds another.")
    base_model: str = Field(description="A catalogue name, resolved under `models_root`.")
    models_root: Path
    job_dir: Path
    dataset_path: Path = Field(description="JSON lines, validated when it was uploaded.")
    dataset_sha256: str
    dataset_id: str = Field(default="", description="What its user knows the dataset by.")
    n_epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate_multiplier: float = Field(gt=0)
    prompt_loss_weight: float = Field(ge=0)
    seed: int = 0
    method: Literal["lora", "full"] | None = Field(
        default=None, description="None: LoRA over a size setting, else full."
    )
    lora: LoraSpec | None = None
    lora_over_parameters: int = Field(default=20_000_000, description="Models with more parameters default to LoRA.")
    max_length: int | None = Field(default=None, description="Tokens a row may have; None: the model's own limit.")
    threads: int = Field(default=1, ge=1)
    workers: int = Field(
        default=1, ge=1, description="Processes that train together; every batch is shared among them."
    )
    cpus: float = Field(
        default=1.0, gt=0, description="CPUs that the cluster keeps for each worker, when there are several."
    )
    gpus: float = Field(default=0.0, ge=0, description="GPUs of each worker, when there are several.")
    checkpoint_every_s: float = Field(default=60.0, ge=0, description="Least time between two checkpoints.")
    progress_every_s: float = Field(default=2.0, gt=0)


class Progress(BaseModel):
    """One line of `progress.jsonl`. Fields that do not belong to the `kind` are null."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["started", "preparing", "prepared", "progress", "finished", "failed"]
    time: float = Field(description="Unix seconds.")
    message: str | None = None
    # prepared
    rows: int | None = None
    tokens: int | None = Field(default=None, description="Tokens in the dataset, by the base model's tokenizer.")
    truncated_rows: int | None = None
    method: Literal["lora", "full"] | None = None
    # progress
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    train_loss: float | None = None
    eta_seconds: float | None = None
    # failed
    code: str | None = Field(
        default=None, description="out_of_memory, bad_row, base_model, fenced, lost_worker, internal ..."
    )


class ManifestFile(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """Says that an attempt is complete, and of what it consists."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job_id: str
    attempt: int
    token: str
    files: list[ManifestFile]
    train_loss: float
    steps: int
    tokens: int


class Checkpoint(BaseModel):
    """Says that a checkpoint is complete, and after which step it was taken. `file.path` is relative to its folder."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int
    total_steps: int
    method: Literal["lora", "full"]
    file: ManifestFile


class ServerStatus(BaseModel):
    """The status file of a model server, replaced atomically at every change."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    state: Literal["starting", "ready", "failed"]
    pid: int
    port: int | None = None
    error: str | None = Field(default=None, description="What went wrong and what to do about it.")
