"""The training loop: plain torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workloads.train.batches import batches_per_epoch, collate, epoch_order, micro_batches
from workloads.train.dataset import Row
from workloads.train.loss import total_weight, weighted_nll
from workloads.train.model import Learner
from workloads.train.optimize import Optimizer


@dataclass(frozen=True)
class Step:
    """What one optimiser step was. `epoch` counts finished epochs, fractions included."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    elapsed_s: float

    @property
    def eta_s(self) -> float:
        return self.elapsed_s / self.step * (self.total_steps - self.step)


def fit(
    learner: Learner,
    rows: Sequence[Row],
    *,
    n_epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[Step], None],
) -> None:
    """Train for `n_epochs`; `after_step` is called after every step and may raise to stop."""
    torch.manual_seed(seed)
    per_epoch = batches_per_epoch(len(rows), batch_size)
    total_steps = n_epochs * per_epoch
    optimizer = Optimizer(learner.model.parameters(), rate=learning_rate, total_steps=total_steps)
    started = time.monotonic()
    step = 0
    for epoch in range(n_epochs):
        for batch in epoch_order(rows, batch_size, seed, epoch):
            rate = optimizer.rate
            loss = gradients(learner, [rows[index] for index in batch])
            optimizer.step()
            step += 1
            after_step(Step(step, total_steps, step / per_epoch, loss, rate, time.monotonic() - started))


def gradients(learner: Learner, rows: Sequence[Row]) -> float:
    """Accumulate the gradients of one batch, part by part where it is large; the batch's loss.

    Every part is divided by the weight of the whole batch, so the parts add up to the loss of the batch at once.
    """
    weight = total_weight(rows)
    if weight == 0:
        return 0.0
    loss = 0.0
    for part in micro_batches(rows, learner.token_budget):
        batch = collate(part, learner.pad_id, learner.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=learner.device.type == "cuda"):
            part_loss = weighted_nll(learner.model, batch) / weight
        part_loss.backward()
        loss += part_loss.item()
    return loss
