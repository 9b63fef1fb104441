"""Checkpoints: how an attempt goes on where an earlier one of the same job was cut off.

An attempt writes only into its own folder, and never changes a file there once its `Checkpoint` was written, last and atomically. So
an earlier attempt that still writes can spoil nothing: what the next one reads is complete, and of the hash it should have.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from workloads.files import sha256_of, write_whole
from workloads.specs import CHECKPOINTS, Checkpoint, attempt_dir
from workloads.train.attempt import Attempt, durable
from workloads.train.model import Learner
from workloads.train.optimize import Optimizer

KEPT = 2
_SHARE = 20
"""Saving takes at most about one part in so many of the time, however large the model."""


def adopt(attempt: Attempt) -> Checkpoint | None:
    """The newest good checkpoint of this job, made this attempt's own: nobody else can take it away then."""
    for checkpoint, folder in sorted(_of_job(attempt), key=lambda found: found[0].step, reverse=True):
        own = attempt.folder / CHECKPOINTS
        own.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if folder != own:
                _link(folder / checkpoint.file.path, own / checkpoint.file.path)
            if sha256_of(own / checkpoint.file.path) == checkpoint.file.sha256:
                write_whole(_record(own, checkpoint.step), checkpoint.model_dump_json())
                return checkpoint
            print(f"the checkpoint {folder / checkpoint.file.path} is damaged and is left out", flush=True)
    return None


class Checkpoints:
    """Those of one attempt: of what is trained, the optimiser and the losses of the epoch, after a step.

    Nothing else changes while a model is trained: the order of rows, the course of the learning rate and the randomness of a step
    all follow from the specification and the step's number.
    """

    def __init__(self, attempt: Attempt, learner: Learner, optimizer: Optimizer, *, total_steps: int) -> None:
        self._attempt = attempt
        self._folder = attempt.folder / CHECKPOINTS
        self._learner = learner
        self._optimizer = optimizer
        self._total_steps = total_steps
        self._every_s = attempt.spec.checkpoint_every_s
        self._due = time.monotonic() + self._every_s

    def resume(self, checkpoint: Checkpoint | None) -> tuple[int, list[float]]:
        """Go on after an adopted checkpoint: its step, and the losses of its epoch. One of another training is left out."""
        if checkpoint is None or (checkpoint.method, checkpoint.total_steps) != (
            self._learner.method,
            self._total_steps,
        ):
            return 0, []
        state = torch.load(self._folder / checkpoint.file.path, map_location=self._learner.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self._learner.trained.items():
                parameter.copy_(state["model"][name])
        self._optimizer.resume(state["optimizer"], checkpoint.step)
        return checkpoint.step, list(state["losses"])

    def after_step(self, step: int, losses: list[float]) -> None:
        """Save, if it is time. A full disk costs the checkpoint, not the training."""
        started = time.monotonic()
        if started < self._due or step == self._total_steps:
            return
        try:
            self._save(step, losses)
            print(f"checkpoint after step {step} in {time.monotonic() - started:.2f} s", flush=True)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter for a full disk
            self._attempt.remark(f"No checkpoint could be written; the training goes on without it: {error}")
        took = time.monotonic() - started
        self._due = started + took + max(self._every_s, _SHARE * took)

    def _save(self, step: int, losses: list[float]) -> None:
        self._attempt.check_fence()
        self._folder.mkdir(exist_ok=True)
        fresh = self._folder / ".new"
        state: dict[str, Any] = {
            "model": {name: parameter.detach() for name, parameter in self._learner.trained.items()},
            "optimizer": self._optimizer.state(),
            "losses": losses,
        }
        try:
            with fresh.open("wb") as file:
                torch.save(state, file)
            entry = durable(fresh, self._folder)
            name = f"step-{step}.pt"
            fresh.replace(self._folder / name)
        finally:
            fresh.unlink(missing_ok=True)
        checkpoint = Checkpoint(
            step=step,
            total_steps=self._total_steps,
            method=self._learner.method,
            file=entry.model_copy(update={"path": name}),
        )
        write_whole(_record(self._folder, step), checkpoint.model_dump_json())
        for old, _ in sorted(_in(self._folder), key=lambda found: found[0].step)[:-KEPT]:
            _record(self._folder, old.step).unlink()
            (self._folder / old.file.path).unlink(missing_ok=True)


def _record(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.json"


def _of_job(attempt: Attempt) -> Iterator[tuple[Checkpoint, Path]]:
    """Every checkpoint that claims to be complete, of this attempt (it may have been started before) and of those before it."""
    for number in range(attempt.spec.attempt, 0, -1):
        yield from _in(attempt_dir(attempt.spec.job_dir, number) / CHECKPOINTS)


def _in(folder: Path) -> Iterator[tuple[Checkpoint, Path]]:
    for path in folder.glob("step-*.json"):
        with contextlib.suppress(OSError, ValueError):
            yield Checkpoint.model_validate_json(path.read_bytes()), folder


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
