"""The training loss: `sum(weight * nll) / sum(weight)` over the predicted tokens of a batch."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from workloads.train.batches import Batch
from workloads.train.dataset import Row


def total_weight(rows: Iterable[Row]) -> float:
    """The loss's denominator. A row's first token is predicted by nothing and has no loss."""
    return float(sum(row.weights[1:].sum(dtype="float64") for row in rows))


def weighted_nll(model: Any, batch: Batch) -> torch.Tensor:
    """The loss's numerator, a scalar: the negative log-likelihood of each token times its weight, summed.

    Logits are computed only for places where some row of the batch has a weight.
    """
    weights = batch.weights[:, 1:]
    places = torch.nonzero(weights.sum(0) > 0).squeeze(1)
    if len(places) == 0:
        return torch.zeros((), requires_grad=True)
    logits = model(
        input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=places
    ).logits.float()
    labels = batch.ids[:, places + 1]
    nll = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (nll * weights[:, places].flatten()).sum()
