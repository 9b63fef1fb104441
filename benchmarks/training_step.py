"""Time of a training step: the trainer's own loop against a bare torch loop on the same batches.

    python -m benchmarks.training_step [--model tiny-llama] [--method full|lora] [--models-root R] [--threads N]

Both start from the same weights and see the same batches in the same order; the rounds alternate, so that a busy machine slows
both. `ratio` is bare time / ours: 1.00 means that the trainer's bookkeeping costs nothing.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from workloads import cores
from workloads.base_models.install import ensure
from workloads.specs import CURRENT_ATTEMPT, TrainSpec
from workloads.train import model
from workloads.train.attempt import Attempt
from workloads.train.batches import batches_per_epoch, collate, epoch_order
from workloads.train.dataset import Row
from workloads.train.job import Reporter
from workloads.train.loop import fit
from workloads.train.optimize import Optimizer, learning_rate

SEED = 7
TARGET = 0.95


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.models_root or Path(scratch) / "models"
        folder = ensure(options.model, root, print)
        spec = _spec(Path(scratch), root, options)
        rows = _rows(options.rows, options.tokens)
        ours, bare = _compare(folder, spec, rows, options.rounds, options.threads)
    steps = batches_per_epoch(len(rows), spec.batch_size)
    _print_table(options, steps, ours, bare)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-llama", help="a base model of the catalogue")
    parser.add_argument("--method", choices=["lora", "full"], help="by default as the trainer chooses")
    parser.add_argument("--models-root", type=Path, help="where the base model is kept; by default a temporary folder")
    parser.add_argument("--threads", type=int, help="by default as the trainer chooses, from all cores")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of the longest row; the shortest has half")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _spec(scratch: Path, root: Path, options: argparse.Namespace) -> TrainSpec:
    job_dir = scratch / "job"
    job_dir.mkdir()
    (job_dir / CURRENT_ATTEMPT).write_text("benchmark")
    return TrainSpec(
        job_id="benchmark",
        attempt=1,
        token="benchmark",
        base_model=options.model,
        models_root=root,
        job_dir=job_dir,
        dataset_path=scratch / "none",
        dataset_sha256="",
        n_epochs=1,
        batch_size=options.batch_size,
        learning_rate_multiplier=0.1,
        prompt_loss_weight=0.01,
        method=options.method,
        threads=options.threads or max(1, os.cpu_count() or 1),
    )


def _rows(count: int, tokens: int) -> list[Row]:
    chance = np.random.default_rng(SEED)
    lengths = chance.integers(tokens // 2, tokens + 1, size=count)
    return [
        Row(
            chance.integers(4, 256, size=length).astype(np.int32),
            np.where(np.arange(length) < length // 2, 0.01, 1.0).astype(np.float32),
        )
        for length in lengths
    ]


def _compare(
    folder: Path, spec: TrainSpec, rows: list[Row], rounds: int, threads: int | None
) -> tuple[list[float], list[float]]:
    """Seconds of each round, ours and bare; one round of each goes before, to warm up."""
    attempt = Attempt(spec)
    attempt.folder.mkdir(parents=True)
    attempt.watch()
    ours: list[float] = []
    bare: list[float] = []
    ways: list[tuple[list[float], Callable[[model.Learner], None]]] = [
        (bare, lambda learner: _bare(learner, rows, spec)),
        (ours, lambda learner: _ours(learner, rows, spec, attempt)),
    ]
    for round_ in range(rounds + 1):
        for times, way in ways if round_ % 2 else reversed(ways):
            learner = model.load(folder, spec)
            torch.set_num_threads(threads or cores.useful_threads(learner.parameters, spec.threads))
            started = time.perf_counter()
            way(learner)
            if round_:
                times.append(time.perf_counter() - started)
    return ours, bare


def _ours(learner: model.Learner, rows: Sequence[Row], spec: TrainSpec, attempt: Attempt) -> None:
    """What a job does, its progress lines and its sign of life included."""
    total_steps = batches_per_epoch(len(rows), spec.batch_size)
    optimizer = Optimizer(learner.model.parameters(), rate=_rate(learner, spec), total_steps=total_steps)
    fit(
        learner,
        optimizer,
        rows,
        n_epochs=1,
        batch_size=spec.batch_size,
        seed=SEED,
        after_step=Reporter(attempt, rows=len(rows)).after_step,
    )


def _bare(learner: model.Learner, rows: Sequence[Row], spec: TrainSpec) -> None:
    """The shortest loop that trains on the same batches with the same loss."""
    parameters = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=_rate(learner, spec), weight_decay=0.0, fused=True)
    for indices in epoch_order(rows, spec.batch_size, SEED, 0):
        batch = collate([rows[index] for index in indices], learner.pad_id, learner.device)
        logits = learner.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
        weights = batch.weights[:, 1:]
        nll = functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        loss = (nll * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)


def _rate(learner: model.Learner, spec: TrainSpec) -> float:
    return learning_rate(spec.learning_rate_multiplier, learner.method, learner.parameters)


def _print_table(options: argparse.Namespace, steps: int, ours: list[float], bare: list[float]) -> None:
    ratios = [b / o for o, b in zip(ours, bare, strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{options.model}, batches of {options.batch_size} rows of up to {options.tokens} tokens, {torch.get_num_threads()} threads"
    )
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n"
    )
    print(f"{'loop':<12}{'ms a step (median)':>20}{'fastest':>12}")
    for name, times in (("bare torch", bare), ("trainer", ours)):
        print(f"{name:<12}{statistics.median(times) / steps * 1e3:>20.2f}{min(times) / steps * 1e3:>12.2f}")
    print(f"\nratio {ratio:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f}), target >= {TARGET}: ", end="")
    print("met" if ratio >= TARGET else "missed")


if __name__ == "__main__":
    main()
