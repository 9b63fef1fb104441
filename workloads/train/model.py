"""The model: loaded for training, given adapters, merged and saved."""

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workloads.specs import LoraSpec, TrainSpec
from workloads.train.errors import TrainingFailure

_LOGITS_AT_ONCE = 64 * 1024 * 1024
_TOKENS_AT_ONCE = 16 * 1024


@dataclass(frozen=True)
class Learner:
    """A model ready for training. Weights are float32 while they are trained and go back to `dtype` when saved."""

    model: Any
    tokenizer: Any
    method: Literal["lora", "full"]
    parameters: int
    """Of the base model, adapters not counted."""
    dtype: torch.dtype
    device: torch.device
    max_length: int

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What changes in the training, by name: all parameters, or the adapters."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    @property
    def token_budget(self) -> int:
        """Padded tokens that go through the model at once, so that the logits stay below 256 MB in float32."""
        return max(1, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // int(self.model.config.vocab_size)))


def load(folder: Path, spec: TrainSpec) -> Learner:
    """Load a base model and prepare it for the method that the specification asks for. Raises `base_model`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise TrainingFailure(
            "base_model", f"transformers cannot load the base model {spec.base_model} from {folder}: {error}"
        ) from error
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise TrainingFailure(
            "base_model",
            f"The base model {spec.base_model} ({type(model).__name__}) is not a language model that can be trained.",
        )
    dtype = model.dtype
    parameters = sum(parameter.numel() for parameter in model.parameters())
    method = method_for(spec, parameters)
    model = model.float().to(device)
    if method == "lora":
        torch.manual_seed(spec.seed)  # the adapters' first weights are drawn
        model = _with_adapters(model, spec.lora or LoraSpec())
    model.train()
    return Learner(model, tokenizer, method, parameters, dtype, device, _max_length(model, tokenizer, spec))


def method_for(spec: TrainSpec, parameters: int) -> Literal["lora", "full"]:
    """What was asked for; adapters where they were described; else by the model's size."""
    if spec.method is not None:
        return spec.method
    return "lora" if spec.lora is not None or parameters > spec.lora_over_parameters else "full"


def save(learner: Learner, target: Path) -> None:
    """Merge adapters and write a folder that transformers loads alone, chat template included."""
    model = learner.model.merge_and_unload() if learner.method == "lora" else learner.model
    model = model.to(device="cpu", dtype=learner.dtype).eval()
    model.config.dtype = learner.dtype
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target)
    learner.tokenizer.save_pretrained(target)


def _with_adapters(model: Any, lora: LoraSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear"
    )
    return get_peft_model(model, config)


def _max_length(model: Any, tokenizer: Any, spec: TrainSpec) -> int:
    """The model's own limit, or a lower one that was asked for."""
    limits = [getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length, spec.max_length]
    return int(min(limit for limit in limits if limit))
