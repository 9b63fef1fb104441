"""Rows into batches: shuffled by the seed, similar lengths together, padded on the right."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workloads.train.dataset import Row

_WINDOW = 16
"""Batches whose rows are sorted by length together: enough to save most of the padding, few enough to stay random."""


@dataclass(frozen=True)
class Batch:
    """Tensors of shape (rows, tokens); `weights` and `mask` are 0 on padding."""

    ids: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor


def batches_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def epoch_order(rows: Sequence[Row], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of each batch of one epoch: every row once, the same for the same seed and epoch."""
    chance = random.Random(f"{seed}/{epoch}")
    order = list(range(len(rows)))
    chance.shuffle(order)
    window = batch_size * _WINDOW
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        if len(part) > batch_size:
            part.sort(key=lambda index: len(rows[index]))
        batches += [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
    chance.shuffle(batches)
    return batches


def micro_batches(rows: Sequence[Row], token_budget: int) -> Iterator[list[Row]]:
    """Cut a batch into parts of at most `token_budget` padded tokens (or one row), longest rows first."""
    part: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if part and len(part[0]) * (len(part) + 1) > token_budget:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def collate(rows: Sequence[Row], pad_id: int, device: Any = "cpu") -> Batch:
    """Pad rows to the longest of them."""
    shape = (len(rows), max(len(row) for row in rows))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape, dtype=torch.float32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.from_numpy(row.ids)
        mask[index, : len(row)] = 1
        weights[index, : len(row)] = torch.from_numpy(row.weights)
    return Batch(ids.to(device), mask.to(device), weights.to(device))
