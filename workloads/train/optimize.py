"""Hyperparameters into an optimiser: the learning rate, its course, AdamW.

`learning_rate_multiplier` scales a reference rate, as in OpenAI's legacy fine-tuning API, whose defaults (0.05, 0.1 and 0.2) it
shares:

- LoRA: 0.02, whatever the model's size: the adapters start at zero and want rates ten times those of full fine-tuning and more
  ("LoRA Without Regret", Thinking Machines Lab 2025). 0.1 gives 2e-3.
- full: 0.015 up to 1M parameters, falling with size to the power of 0.7. At 0.1 that is 1.5e-3 for `tiny-llama` (which learnt 20 of
  20 answers anywhere between 0.05 and 0.5, and diverged at 1), and comes near the customary rates of larger models: 5e-5 for 135M
  parameters, 3e-6 for 7B.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

LORA_RATE = 0.02
FULL_RATE = 0.015
_FULL_AT = 1e6
_FULL_POWER = 0.7
_WARM_UP = 0.05
_MAX_NORM = 1.0


def learning_rate(multiplier: float, method: Literal["lora", "full"], parameters: int) -> float:
    """The highest learning rate of a training."""
    reference = LORA_RATE if method == "lora" else FULL_RATE * (_FULL_AT / max(parameters, _FULL_AT)) ** _FULL_POWER
    return multiplier * reference


def course(step: int, total_steps: int) -> float:
    """The share of the highest rate at a step (from 0): a short linear warm-up, then a half cosine towards zero."""
    warm = max(1, math.ceil(_WARM_UP * total_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm + 1) / (total_steps - warm + 1)))


class Optimizer:
    """AdamW with the course of the learning rate and clipped gradients."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, rate: float, total_steps: int) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._rate = rate
        self._total_steps = total_steps
        self._step = 0
        self._adamw = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.0, fused=True)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self._rate * course(self._step, self._total_steps)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._adamw.state_dict()
        return state

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Go on as after `step` steps."""
        self._adamw.load_state_dict(state)
        self._step = step

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, _MAX_NORM)
        for group in self._adamw.param_groups:
            group["lr"] = self.rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._step += 1
