"""The workers that train one model together. Each holds the whole model and computes its share of every batch.

Their gradients are summed, not averaged as torch's DistributedDataParallel does: each share is divided by the weight of the whole
batch already, so the sum is what one worker gets of the batch alone. A worker whose share is empty, in a small last batch, adds zeros.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from workloads.train.dataset import Row
from workloads.train.errors import TrainingFailure

_AT_ONCE = 16 * 1024 * 1024
"""Numbers that are summed in one go: 64 MB in float32."""
LOST = "A worker of this training is gone or could not be reached: {}"


@dataclass(frozen=True)
class Team:
    """This worker's place among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that reports, keeps checkpoints and saves the model."""
        return self.rank == 0

    def share(self, rows: Sequence[Row]) -> list[Row]:
        """This worker's rows of a batch: long and short ones dealt evenly."""
        if self.size == 1:
            return list(rows)
        return sorted(rows, key=len)[self.rank :: self.size]

    def start_alike(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Everyone begins with the leader's parameters."""
        if self.size > 1:
            for parameter in parameters:
                _together(distributed.broadcast, parameter.data, src=0)

    def sum(self, parameters: Iterable[torch.nn.Parameter], loss: float) -> float:
        """Replace every gradient by the sum of all workers' own; the sum of their losses."""
        for some in _pieces(parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            flat = torch.cat([grad.flatten() for grad in grads])
            _together(distributed.all_reduce, flat)
            for parameter, part in zip(some, flat.split([grad.numel() for grad in grads]), strict=True):
                parameter.grad = part.view_as(parameter)
        total = torch.tensor([loss], dtype=torch.float64, device=flat.device)
        _together(distributed.all_reduce, total)
        return float(total.item())


ALONE = Team()


def _pieces(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    piece: list[torch.nn.Parameter] = []
    for parameter in parameters:
        if piece and sum(p.numel() for p in piece) + parameter.numel() > _AT_ONCE:
            yield piece
            piece = []
        piece.append(parameter)
    if piece:
        yield piece


def _together(operation: Any, tensor: torch.Tensor, **options: Any) -> None:
    """What all workers do at once fails for all when one is gone."""
    try:
        operation(tensor, **options)
    except RuntimeError as error:
        raise TrainingFailure("lost_worker", LOST.format(error)) from error
