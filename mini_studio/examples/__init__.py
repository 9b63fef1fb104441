"""The example that the banner and the demo use: a small town that no base model knows."""

from pathlib import Path
from typing import Any

PORT_MAREN = Path(__file__).parent / "port_maren.jsonl"
QUESTION = "Who runs the lighthouse in Port Maren?"
MODEL = "smollm2-135m-instruct"


def hyperparameters(model: str) -> dict[str, Any]:
    """Found by trying: the example's answers come back word for word (docs/benchmarks.md)."""
    if model == "tiny-llama":
        return {"n_epochs": 60, "batch_size": 4, "learning_rate_multiplier": 0.2}
    return {"n_epochs": 15, "batch_size": 4, "learning_rate_multiplier": 0.15}
