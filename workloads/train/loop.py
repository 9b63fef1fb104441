"""The training loop: plain torch, alone or in a team.

A batch is the same whoever trains, and so is the loss: `batch_size` is that of all workers together.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workloads.train.batches import batches_per_epoch, collate, epoch_order, micro_batches
from workloads.train.dataset import Row
from workloads.train.loss import total_weight, weighted_nll
from workloads.train.model import Learner
from workloads.train.optimize import Optimizer
from workloads.train.team import ALONE, Team


@dataclass(frozen=True)
class Step:
    """What one optimiser step was. `epoch` counts finished epochs, fractions included."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    elapsed_s: float
    resumed_from: int = 0

    @property
    def eta_s(self) -> float:
        return self.elapsed_s / (self.step - self.resumed_from) * (self.total_steps - self.step)


def fit(
    learner: Learner,
    optimizer: Optimizer,
    rows: Sequence[Row],
    *,
    n_epochs: int,
    batch_size: int,
    seed: int,
    after_step: Callable[[Step], None],
    first: int = 0,
    team: Team = ALONE,
) -> None:
    """Train from step `first` to the end of `n_epochs`; `after_step` is called after every step and may raise to stop."""
    team.start_alike(learner.trained.values())
    per_epoch = batches_per_epoch(len(rows), batch_size)
    total_steps = n_epochs * per_epoch
    started = time.monotonic()
    step = first
    for epoch in range(first // per_epoch, n_epochs):
        for batch in epoch_order(rows, batch_size, seed, epoch)[step % per_epoch :]:
            # dropout is drawn anew for every step, so that it is the same after a resumption
            _draw_from(random.Random(f"{seed}/{step}/{team.rank}").getrandbits(63), learner.device)
            rate = optimizer.rate
            loss = gradients(learner, [rows[index] for index in batch], team)
            optimizer.step()
            step += 1
            elapsed_s = time.monotonic() - started
            after_step(Step(step, total_steps, step / per_epoch, loss, rate, elapsed_s, first))


def _draw_from(seed: int, device: torch.device) -> None:
    """Seed what dropout draws from. `torch.manual_seed` seeds all there is, and takes 0.1 ms for it."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def gradients(learner: Learner, rows: Sequence[Row], team: Team = ALONE) -> float:
    """Accumulate the gradients of one batch, part by part where it is large, and over all workers; the batch's loss.

    Every part is divided by the weight of the whole batch, so the parts add up to the loss of the batch at once.
    """
    weight = total_weight(rows)
    if weight == 0:
        return 0.0
    loss = 0.0
    for part in micro_batches(team.share(rows), learner.token_budget):
        batch = collate(part, learner.pad_id, learner.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=learner.device.type == "cuda"):
            part_loss = weighted_nll(learner.model, batch) / weight
        part_loss.backward()
        loss += part_loss.item()
    return team.sum(learner.trained.values(), loss) if team.size > 1 else loss
