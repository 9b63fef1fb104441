"""Several workers against one: the same batches, the same loss at every step, the same weights in the end."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes.ray_head import free_ports
from workloads.specs import TrainSpec
from workloads.train import model
from workloads.train.attempt import Attempt
from workloads.train.batches import batches_per_epoch
from workloads.train.dataset import Encoder, Row
from workloads.train.loop import fit
from workloads.train.optimize import Optimizer
from workloads.train.team import ALONE, Team

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4
"""Largest difference of a step's loss, relative. Only the order of float additions differs; docs/training.md has what was measured."""


def trained(spec: TrainSpec, team: Team = ALONE) -> dict[str, Any]:
    """The losses of all steps, and a sum over the weights."""
    torch.set_num_threads(1)
    learner = model.load(spec.models_root / ".base" / spec.base_model, spec)
    encoder = Encoder(learner.tokenizer, prompt_loss_weight=spec.prompt_loss_weight, max_length=2048)
    rows = encoder.encode(spec.dataset_path).rows[:-1]  # 19 rows: the last batch of 6 has one
    total_steps = spec.n_epochs * batches_per_epoch(len(rows), spec.batch_size)
    losses: list[float] = []
    fit(
        learner,
        Optimizer(learner.model.parameters(), rate=1.5e-3, total_steps=total_steps),
        rows,
        n_epochs=spec.n_epochs,
        batch_size=spec.batch_size,
        seed=spec.seed,
        after_step=lambda step: losses.append(step.loss),
        team=team,
    )
    with torch.no_grad():
        return {"losses": losses, "weights": sum(float(p.abs().sum()) for p in learner.trained.values())}


def together(attempt: Attempt, size: int) -> list[dict[str, Any]]:
    """What each of `size` processes got, over gloo."""
    (port,) = free_ports(1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(attempt.folder / "spec.json"), str(rank), str(size)],
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    return [json.loads(worker.communicate(timeout=100)[0]) for worker in workers]


@pytest.mark.parametrize(("size", "method"), [(2, "full"), pytest.param(3, "lora", marks=pytest.mark.real)])
def test_workers_have_the_losses_of_one_with_the_same_batches(make_attempt: Any, size: int, method: str) -> None:
    attempt: Attempt = make_attempt(n_epochs=5, batch_size=6, method=method, seed=3)
    alone = trained(attempt.spec)
    assert len(alone["losses"]) == 20
    for worker in together(attempt, size):
        assert worker["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
        assert worker["weights"] == pytest.approx(alone["weights"], rel=TOLERANCE)
    off = [abs(a - b) / b for a, b in zip(worker["losses"], alone["losses"], strict=True)]
    print(f"{size} workers, {method}: the losses differ by up to {max(off):.1e}")


@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_every_row_of_a_batch_is_one_workers(rows: int) -> None:
    batch = [
        Row(np.arange(length, dtype=np.int32), np.ones(length, dtype=np.float32)) for length in range(rows + 2, 2, -1)
    ]
    shares = [Team(rank, 3).share(batch) for rank in range(3)]
    assert sorted(len(row) for share in shares for row in share) == sorted(len(row) for row in batch)
    assert max(len(share) for share in shares) - min(len(share) for share in shares) <= 1


def main() -> None:
    spec, rank, size = TrainSpec.model_validate_json(Path(sys.argv[1]).read_bytes()), int(sys.argv[2]), int(sys.argv[3])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    print(json.dumps(trained(spec, Team(rank, size))))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
