"""Each hyperparameter reaches the optimiser or the loss, and changes training in the expected direction."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from workloads.specs import LoraSpec
from workloads.train import model
from workloads.train.batches import batches_per_epoch, collate
from workloads.train.dataset import Encoder
from workloads.train.loop import Step, fit
from workloads.train.loss import total_weight, weighted_nll
from workloads.train.optimize import Optimizer, course, learning_rate


@dataclass
class Trained:
    steps: list[Step]
    completion_loss: float
    prompt_loss: float
    moved: float
    """Distance of the weights from where they started."""

    @property
    def top_rate(self) -> float:
        return max(step.learning_rate for step in self.steps)


@pytest.fixture
def train(make_attempt: Any, models_root: Path, pairs_file: Path) -> Callable[..., Trained]:
    def run(**fields: Any) -> Trained:
        spec = make_attempt(**fields).spec
        learner = model.load(models_root / ".base" / "tiny-llama", spec)
        before = [parameter.detach().clone() for parameter in learner.model.parameters()]
        steps: list[Step] = []
        encoder = Encoder(learner.tokenizer, prompt_loss_weight=spec.prompt_loss_weight, max_length=2048)
        rows = encoder.encode(pairs_file).rows
        rate = learning_rate(spec.learning_rate_multiplier, learner.method, learner.parameters)
        total_steps = spec.n_epochs * batches_per_epoch(len(rows), spec.batch_size)
        fit(
            learner,
            Optimizer(learner.model.parameters(), rate=rate, total_steps=total_steps),
            rows,
            n_epochs=spec.n_epochs,
            batch_size=spec.batch_size,
            seed=spec.seed,
            after_step=steps.append,
        )
        after = learner.model.parameters()
        moved = sum(float((a.detach() - b).square().sum()) for a, b in zip(after, before, strict=True)) ** 0.5
        return Trained(steps, *losses(learner, pairs_file), moved)

    return run


def losses(learner: model.Learner, path: Path) -> tuple[float, float]:
    """Loss on completions alone, and on prompts alone."""
    learner.model.eval()
    rows = Encoder(learner.tokenizer, prompt_loss_weight=0.5, max_length=2048).encode(path).rows
    found = []
    for kind in (1.0, 0.5):
        kept = [type(row)(row.ids, (row.weights == kind).astype("float32")) for row in rows]
        with torch.no_grad():
            found.append(float(weighted_nll(learner.model, collate(kept, learner.pad_id))) / total_weight(kept))
    return found[0], found[1]


def test_more_epochs_are_more_steps_and_a_lower_loss(train: Callable[..., Trained]) -> None:
    short, long = train(n_epochs=1), train(n_epochs=5)
    assert (len(short.steps), len(long.steps)) == (5, 25)
    assert long.steps[-1].total_steps == 25
    assert long.steps[-1].epoch == 5
    assert long.completion_loss < short.completion_loss


def test_a_larger_batch_is_fewer_steps(train: Callable[..., Trained]) -> None:
    small, large = train(batch_size=2, n_epochs=3), train(batch_size=20, n_epochs=3)
    assert (len(small.steps), len(large.steps)) == (30, 3)
    assert small.completion_loss < large.completion_loss


def test_the_multiplier_scales_the_learning_rate(train: Callable[..., Trained]) -> None:
    slow, fast = train(learning_rate_multiplier=0.01), train(learning_rate_multiplier=0.1)
    assert fast.top_rate == pytest.approx(10 * slow.top_rate)
    assert fast.moved > slow.moved
    assert fast.completion_loss < slow.completion_loss


def test_the_prompt_loss_weight_decides_how_much_of_the_prompts_is_learnt(train: Callable[..., Trained]) -> None:
    without, with_prompts = train(prompt_loss_weight=0.0, n_epochs=10), train(prompt_loss_weight=1.0, n_epochs=10)
    assert with_prompts.prompt_loss < without.prompt_loss
    assert without.completion_loss < with_prompts.completion_loss


def test_the_seed_decides_the_order(train: Callable[..., Trained]) -> None:
    first, same, other = train(seed=1), train(seed=1), train(seed=2)
    assert [step.loss for step in first.steps] == [step.loss for step in same.steps]
    assert [step.loss for step in first.steps] != [step.loss for step in other.steps]


def test_the_learning_rate_warms_up_and_decays() -> None:
    rates = [course(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert course(0, 1) == 1.0


def test_larger_models_are_tuned_more_gently() -> None:
    assert learning_rate(0.1, "full", 886_400) == pytest.approx(1.5e-3)
    assert learning_rate(0.1, "full", 135_000_000) < 1e-4
    assert learning_rate(0.1, "lora", 135_000_000) == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("fields", "parameters", "expected"),
    [
        ({}, 1_000_000, "full"),
        ({}, 30_000_000, "lora"),
        ({"method": "full"}, 30_000_000, "full"),
        ({"method": "lora"}, 1_000_000, "lora"),
        ({"lora": LoraSpec(r=4)}, 1_000_000, "lora"),
        ({"lora_over_parameters": 10}, 1_000_000, "lora"),
    ],
)
def test_the_method_follows_the_request_then_the_size(
    make_attempt: Any, fields: dict[str, Any], parameters: int, expected: str
) -> None:
    assert model.method_for(make_attempt(**fields).spec, parameters) == expected


def test_the_seed_decides_the_adapters_first_weights(make_attempt: Any, models_root: Path) -> None:
    def adapters(seed: int) -> torch.Tensor:
        spec = make_attempt(method="lora", seed=seed).spec
        learner = model.load(models_root / ".base" / "tiny-llama", spec)
        return torch.cat([p.detach().flatten() for p in learner.model.parameters() if p.requires_grad])

    first = adapters(3)
    assert torch.equal(first, adapters(3))
    assert not torch.equal(first, adapters(4))


def test_lora_trains_adapters_of_the_asked_rank_only(make_attempt: Any, models_root: Path) -> None:
    spec = make_attempt(lora=LoraSpec(r=3, alpha=6)).spec
    learner = model.load(models_root / ".base" / "tiny-llama", spec)
    trained = {name: parameter for name, parameter in learner.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(3 in parameter.shape for parameter in trained.values())
    assert any("down_proj" in name for name in trained)
    assert any("q_proj" in name for name in trained)
