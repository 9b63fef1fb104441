"""The files of a training attempt, as the studio writes and reads them; `workloads.specs` draws the folder."""

import contextlib
import math
import shutil
from pathlib import Path

from pydantic import ValidationError

from mini_studio.drivers.ports import Workers
from mini_studio.files import replace_file
from mini_studio.ingest import key_of
from mini_studio.records.training_runs import TrainingRun
from mini_studio.settings import Settings
from workloads.specs import (
    CHECKPOINTS,
    COMMITTED,
    CURRENT_ATTEMPT,
    HEARTBEAT,
    MANIFEST,
    PROGRESS,
    SPEC,
    WEIGHTS,
    LoraSpec,
    Manifest,
    Progress,
    TrainSpec,
    attempt_dir,
)

ABSENT = (FileNotFoundError, NotADirectoryError)
"""A file is not there; the second, where the attempt's folder could never be made."""


def job_folder(run: TrainingRun, settings: Settings) -> Path:
    """`<models root>/<client>/<job id>`; both parts have patterns without separators."""
    return settings.models / run.client_code / run.id


def folder(run: TrainingRun, settings: Settings) -> Path:
    return attempt_dir(job_folder(run, settings), run.attempt)


def final_path(run: TrainingRun, settings: Settings) -> Path:
    """What users deploy."""
    return job_folder(run, settings) / COMMITTED


def train_spec(run: TrainingRun, settings: Settings) -> TrainSpec:
    parameters, training = run.request.hyperparameters, settings.training
    lora = parameters.lora
    return TrainSpec(
        job_id=run.id,
        attempt=run.attempt,
        token=run.token,
        base_model=run.request.base_model,
        models_root=settings.models,
        job_dir=job_folder(run, settings),
        dataset_path=settings.dfs / key_of(run.request.dataset.dfs_path),  # the data folder may have moved
        dataset_sha256=run.request.dataset.sha256,
        dataset_id=run.request.dataset.id,
        n_epochs=parameters.n_epochs,
        batch_size=parameters.batch_size,
        learning_rate_multiplier=parameters.learning_rate_multiplier,
        prompt_loss_weight=parameters.prompt_loss_weight,
        seed=parameters.seed,
        method=parameters.method,
        lora=LoraSpec(**lora.model_dump()) if lora else None,
        threads=training.threads if training.workers == 1 else math.ceil(training.cpus),
        workers=training.workers,
        cpus=training.cpus,
        gpus=training.gpus,
        checkpoint_every_s=training.checkpoint_every_s,
    )


def workers(settings: Settings) -> Workers:
    """What a training needs of the cluster."""
    return Workers(settings.training.workers, settings.training.cpus, settings.training.gpus)


def prepare(spec: TrainSpec) -> Path:
    """Make the attempt's folder, hand it the job's token, and write its spec; the spec file's path."""
    attempt = attempt_dir(spec.job_dir, spec.attempt)
    attempt.mkdir(parents=True, exist_ok=True)
    replace_file(spec.job_dir / CURRENT_ATTEMPT, spec.token)
    replace_file(attempt / SPEC, spec.model_dump_json())
    _keep_newest_checkpoints(spec)
    return attempt / SPEC


def _keep_newest_checkpoints(spec: TrainSpec) -> None:
    """An attempt goes on from a copy of its own, so what those before the last one left is of no use any more."""
    before = [attempt_dir(spec.job_dir, number) / CHECKPOINTS for number in range(spec.attempt - 1, 0, -1)]
    for older in [folder for folder in before if any(folder.glob("step-*.json"))][1:]:
        shutil.rmtree(older, ignore_errors=True)


def void(job_dir: Path, token: str) -> None:
    """Take the token away, if the job still has it: whoever trains under it stops by itself."""
    file = job_dir / CURRENT_ATTEMPT
    with contextlib.suppress(*ABSENT):
        if file.read_text() == token:
            file.unlink()


def fence(job_dir: Path) -> None:
    """Take the token away, whoever has it: nobody trains for this job any more."""
    with contextlib.suppress(*ABSENT):
        (job_dir / CURRENT_ATTEMPT).unlink()


def give_up(job_dir: Path, token: str, over: bool) -> None:
    """Void a lost attempt; after the last one nobody needs the checkpoints."""
    void(job_dir, token)
    if over:
        remove_checkpoints(job_dir)


def remove_checkpoints(job_dir: Path) -> None:
    """The job is over. What an attempt that does not know it yet writes late stays, until its fence ends it."""
    for folder in job_dir.glob(f"attempts/*/{CHECKPOINTS}"):
        shutil.rmtree(folder, ignore_errors=True)


def remove_artifacts(job_dir: Path) -> None:
    """The job was cancelled: nothing that its attempts made is of use. What they said stays."""
    for folder in job_dir.glob("attempts/*"):
        (folder / MANIFEST).unlink(missing_ok=True)  # first: it says that the rest is complete
        shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    remove_checkpoints(job_dir)


def read_progress(attempt: Path, offset: int) -> tuple[list[Progress], int]:
    """Complete lines behind `offset`, and where they end. A line that is not ours is skipped."""
    try:
        with (attempt / PROGRESS).open("rb") as file:
            file.seek(offset)
            new = file.read()
    except ABSENT:
        return [], offset
    whole = new[: new.rfind(b"\n") + 1]
    lines = []
    for line in whole.splitlines():
        with contextlib.suppress(ValidationError):
            lines.append(Progress.model_validate_json(line))
    return lines, offset + len(whole)


def last_sign_of_life(attempt: Path) -> float:
    """Unix seconds of the newest heartbeat or progress; 0.0 when there was none."""
    newest = 0.0
    for name in (HEARTBEAT, PROGRESS):
        with contextlib.suppress(*ABSENT):
            newest = max(newest, (attempt / name).stat().st_mtime)
    return newest


def manifest(attempt: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((attempt / MANIFEST).read_bytes())
    except (*ABSENT, ValidationError):
        return None


def complete(attempt: Path, run: TrainingRun) -> bool:
    """Whether the attempt's manifest is there, is this token's, and every file has the size it names."""
    found = manifest(attempt)
    if found is None or (found.job_id, found.token) != (run.id, run.token):
        return False
    return all(_size(attempt, entry.path) == entry.size_bytes for entry in found.files)


def _size(attempt: Path, path: str) -> int | None:
    for base in (attempt, attempt / WEIGHTS):
        with contextlib.suppress(OSError):
            return (base / path).stat().st_size
    return None


def publish(attempt: Path, run: TrainingRun) -> Manifest:
    """Make the job's final path point at this attempt's weights. Repeating it changes nothing."""
    found = manifest(attempt)
    if found is None:
        raise FileNotFoundError(f"{attempt / MANIFEST} of the committed attempt is gone")
    target = Path("attempts") / str(run.attempt) / WEIGHTS
    job_dir = attempt.parent.parent
    temporary = job_dir / f".{COMMITTED}-{run.token}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    temporary.symlink_to(target)
    temporary.replace(job_dir / COMMITTED)
    return found
