"""One attempt from start to end: dataset, base model, training, result. Every worker of a team runs it; the leader writes."""

import math
import time
from collections import deque
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from workloads import cores
from workloads.base_models.errors import BaseModelError
from workloads.base_models.install import ensure
from workloads.specs import WEIGHTS, Checkpoint, TrainSpec
from workloads.train import model
from workloads.train.attempt import Attempt
from workloads.train.batches import batches_per_epoch
from workloads.train.checkpoints import Checkpoints, adopt
from workloads.train.dataset import Encoded, Encoder, check_hash
from workloads.train.errors import TrainingFailure
from workloads.train.loop import Step, fit
from workloads.train.optimize import Optimizer, learning_rate
from workloads.train.team import ALONE, Team

_REPORT_ROWS_S = 2.0


def train(attempt: Attempt) -> None:
    """Train and commit. Raises `TrainingFailure`, or whatever broke."""
    if attempt.spec.workers == 1:
        work(attempt, prepare(attempt))
    else:
        from workloads.train.workers import train_together  # Ray takes seconds to load

        train_together(attempt, prepare(attempt))


def prepare(attempt: Attempt) -> Checkpoint | None:
    """What is done once, however many workers there are; the checkpoint to go on from."""
    attempt.preparing("checking the dataset")
    check_hash(attempt.spec.dataset_path, attempt.spec.dataset_sha256, attempt.spec.dataset_id)
    _base_model(attempt)
    return adopt(attempt)


def work(attempt: Attempt, checkpoint: Checkpoint | None, team: Team = ALONE) -> None:
    """One worker's part."""
    spec = attempt.spec
    transformers_logging.disable_progress_bar()
    attempt.preparing(f"loading the base model {spec.base_model}")
    learner = model.load(_base_model(attempt), spec)
    torch.set_num_threads(cores.useful_threads(learner.parameters, spec.threads))
    data = _encode(attempt, learner)
    attempt.say(
        kind="prepared", rows=len(data.rows), tokens=data.tokens, truncated_rows=data.truncated, method=learner.method
    )
    progress = Reporter(attempt, rows=len(data.rows))
    rate = learning_rate(spec.learning_rate_multiplier, learner.method, learner.parameters)
    total_steps = spec.n_epochs * batches_per_epoch(len(data.rows), spec.batch_size)
    optimizer = Optimizer(learner.model.parameters(), rate=rate, total_steps=total_steps)
    checkpoints = Checkpoints(attempt, learner, optimizer, total_steps=total_steps)
    first, losses = checkpoints.resume(checkpoint)
    if team.leads:
        print(
            f"{learner.method} fine-tuning of {learner.parameters:,} parameters at a learning rate of {rate:.3g}",
            flush=True,
        )
    if first:
        progress.resumed(first, total_steps, losses)

    def after_step(step: Step) -> None:
        progress.after_step(step)
        if team.leads:
            checkpoints.after_step(step.step, progress.epoch_losses)

    fit(
        learner,
        optimizer,
        data.rows,
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        seed=spec.seed,
        after_step=after_step,
        first=first,
        team=team,
    )
    if team.leads:
        finish(attempt, learner, progress, data)


def finish(attempt: Attempt, learner: model.Learner, progress: "Reporter", data: Encoded) -> None:
    progress.saving()
    weights = attempt.folder / WEIGHTS
    attempt.check_fence()
    model.save(learner, weights)
    attempt.commit(weights=weights, train_loss=progress.epoch_loss, steps=progress.steps, tokens=data.tokens)
    attempt.say(kind="finished", message="the model is saved", train_loss=progress.epoch_loss, **progress.counts())


def _base_model(attempt: Attempt) -> Path:
    try:
        return ensure(attempt.spec.base_model, attempt.spec.models_root, attempt.preparing)
    except BaseModelError as error:
        raise TrainingFailure("base_model", str(error)) from error


def _encode(attempt: Attempt, learner: model.Learner) -> Encoded:
    said = time.monotonic()

    def report(rows: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _REPORT_ROWS_S:
            said = time.monotonic()
            attempt.preparing(f"tokenizing the dataset: {rows:,} rows")

    spec: TrainSpec = attempt.spec
    encoder = Encoder(learner.tokenizer, prompt_loss_weight=spec.prompt_loss_weight, max_length=learner.max_length)
    return encoder.encode(spec.dataset_path, report)


class Reporter:
    """Turns steps into progress: the first and the last one, and in between every `progress_every_s`."""

    def __init__(self, attempt: Attempt, *, rows: int) -> None:
        self._attempt = attempt
        self._losses: deque[float] = deque(maxlen=batches_per_epoch(rows, attempt.spec.batch_size))
        self._unsaid: list[float] = []
        self._said = 0.0
        self._last: Step | None = None

    @property
    def steps(self) -> int:
        return self._last.step if self._last else 0

    @property
    def epoch_losses(self) -> list[float]:
        """Those of the last epoch's steps, as far as it is."""
        return list(self._losses)

    @property
    def epoch_loss(self) -> float:
        """Mean loss of the last epoch's steps."""
        return sum(self._losses) / max(1, len(self._losses))

    def counts(self) -> dict[str, float]:
        last = self._last
        return {"step": last.step, "total_steps": last.total_steps, "epoch": round(last.epoch, 3)} if last else {}

    def resumed(self, step: int, total_steps: int, losses: list[float]) -> None:
        self._losses.extend(losses)
        self._attempt.tell(message=f"resumed from step {step}", step=step, total_steps=total_steps)

    def after_step(self, step: Step) -> None:
        if not math.isfinite(step.loss):
            raise TrainingFailure(
                "internal",
                "The loss is no number any more: the training diverged. Submit again with a lower learning_rate_multiplier.",
            )
        self._last = step
        self._losses.append(step.loss)
        self._unsaid.append(step.loss)
        due = time.monotonic() - self._said >= self._attempt.spec.progress_every_s
        if due or step.step in (step.resumed_from + 1, step.total_steps):
            self._say(round(step.eta_s, 1))

    def saving(self) -> None:
        self._say(0.0, "saving the model")

    def _say(self, eta_seconds: float, message: str | None = None) -> None:
        recent = self._unsaid or list(self._losses)[-1:]
        self._attempt.tell(
            message=message,
            train_loss=round(sum(recent) / len(recent), 5),
            eta_seconds=eta_seconds,
            **self.counts(),
        )
        self._unsaid = []
        self._said = time.monotonic()
