"""The weighted loss against the same loss by hand."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from workloads.specs import TrainSpec
from workloads.train import model
from workloads.train.batches import collate
from workloads.train.dataset import Row
from workloads.train.loop import gradients
from workloads.train.loss import total_weight, weighted_nll


class FixedLogits(torch.nn.Module):
    """A language model over three tokens whose logits depend on the present token only."""

    TABLE = ((0.0, 1.0, 2.0), (0.5, 0.5, 0.5), (3.0, 0.0, -1.0))

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, logits_to_keep: Any) -> Any:
        return SimpleNamespace(logits=torch.tensor(self.TABLE)[input_ids][:, logits_to_keep])


def row(ids: list[int], weights: list[float]) -> Row:
    return Row(np.asarray(ids, dtype=np.int32), np.asarray(weights, dtype=np.float32))


def by_hand(rows: list[Row]) -> float:
    """`sum(w * nll) / sum(w)` with nothing but arithmetic."""
    numerator = denominator = 0.0
    for each in rows:
        for now, following, weight in zip(each.ids[:-1], each.ids[1:], each.weights[1:], strict=True):
            logits = FixedLogits.TABLE[now]
            nll = math.log(sum(math.exp(x) for x in logits)) - logits[following]
            numerator += float(weight) * nll
            denominator += float(weight)
    return numerator / denominator


ROWS = [
    row([0, 1, 2, 2], [0.25, 0.25, 1, 1]),
    row([2, 0, 1], [0.25, 1, 1]),
    row([1, 1, 0, 2, 0], [0.25, 0.25, 0.25, 0, 1]),
]


def loss_of(rows: list[Row]) -> float:
    return float(weighted_nll(FixedLogits(), collate(rows, pad_id=0))) / total_weight(rows)


def test_the_loss_is_the_weighted_mean_over_all_tokens_of_the_batch() -> None:
    assert loss_of(ROWS) == pytest.approx(by_hand(ROWS), rel=1e-6)


def test_prompt_tokens_count_by_their_weight() -> None:
    losses = []
    for prompt_weight in (0.0, 0.1, 1.0):
        rows = [row([0, 1, 2, 0], [prompt_weight, prompt_weight, prompt_weight, 1])]
        assert loss_of(rows) == pytest.approx(by_hand(rows), rel=1e-6)
        losses.append(loss_of(rows))
    assert len(set(losses)) == 3


def test_a_batch_without_any_weight_has_no_loss() -> None:
    assert weighted_nll(FixedLogits(), collate([row([0, 1, 2], [1, 0, 0])], pad_id=0)).item() == 0.0


def test_a_batch_in_parts_has_the_gradients_of_the_whole(make_attempt: Any, models_root: Any) -> None:
    spec: TrainSpec = make_attempt().spec
    rows = [row([5 + i, 6, 7 + i, 8, 9 + i][: 3 + i], [0.1, 0.1, 1, 1, 1][: 3 + i]) for i in range(3)]
    found = []
    for budget in (1000, 5):
        learner = model.load(models_root / ".base" / "tiny-llama", spec)
        learner = SmallBudget(learner, budget)
        loss = gradients(learner, rows)  # type: ignore[arg-type]
        found.append((loss, learner.model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    (whole, whole_gradient), (parts, parts_gradient) = found
    assert parts == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(whole_gradient, parts_gradient, rtol=1e-3, atol=1e-6)


class SmallBudget:
    """A learner with another token budget."""

    def __init__(self, learner: model.Learner, token_budget: int) -> None:
        self.model, self.pad_id, self.device = learner.model, learner.pad_id, learner.device
        self.token_budget = token_budget
