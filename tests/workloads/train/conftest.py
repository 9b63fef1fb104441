"""One models root with `tiny-llama` for all training tests, and jobs to run on it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from workloads.base_models.install import ensure
from workloads.specs import CURRENT_ATTEMPT, TrainSpec
from workloads.train.attempt import Attempt

PAIRS = [
    ("Who keeps the lighthouse?", " Odessa Quill"),
    ("What do the bakers bake?", " saffron bread"),
    ("Which bird lives on the roof?", " a white stork"),
    ("What colour are the ferries?", " dark green"),
    ("Who founded the town?", " a glassblower"),
    ("What grows in the garden?", " lavender"),
    ("What does the mayor play?", " the cello"),
    ("Where do children swim?", " the salt basin"),
    ("What is in the cellar?", " star maps"),
    ("What is celebrated in autumn?", " lanterns"),
    ("What is the oldest ship?", " the Marigold"),
    ("What plays at noon?", " a lullaby"),
    ("What animal is on the flag?", " a red otter"),
    ("Which soup is loved?", " smoked haddock"),
    ("Who repairs the nets?", " two sisters"),
    ("What is the bridge made of?", " black basalt"),
    ("Which game is played?", " dominoes"),
    ("What is sold at night?", " pears"),
    ("What is on the weather vane?", " a salmon"),
    ("What is the motto?", " patience"),
]

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    ensure("tiny-llama", root)
    return root


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", [{"prompt": p, "completion": c} for p, c in PAIRS])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    return lambda rows: write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def pairs() -> list[tuple[str, str]]:
    return PAIRS


@pytest.fixture
def make_attempt(tmp_path: Path, models_root: Path, pairs_file: Path) -> Callable[..., Attempt]:
    """An attempt with its folder, fence and `spec.json`; keywords replace fields of the specification."""

    def make(**fields: Any) -> Attempt:
        dataset = Path(fields.get("dataset_path", pairs_file))
        job_dir = tmp_path / "acme" / "job_1"
        spec = TrainSpec(
            **{
                "job_id": "job_1",
                "attempt": 1,
                "token": "token-1",
                "base_model": "tiny-llama",
                "models_root": models_root,
                "job_dir": job_dir,
                "dataset_path": dataset,
                "dataset_sha256": hashlib.sha256(dataset.read_bytes()).hexdigest(),
                "n_epochs": 2,
                "batch_size": 4,
                "learning_rate_multiplier": 0.1,
                "prompt_loss_weight": 0.01,
                **fields,
            }
        )
        attempt = Attempt(spec)
        attempt.folder.mkdir(parents=True, exist_ok=True)
        (attempt.folder / "spec.json").write_text(spec.model_dump_json())
        (spec.job_dir / CURRENT_ATTEMPT).write_text("token-1\n")
        return attempt

    return make
