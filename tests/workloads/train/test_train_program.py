"""The whole program in its own process, as Ray starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workloads.specs import CURRENT_ATTEMPT, MANIFEST, PROGRESS, WEIGHTS, Manifest
from workloads.train.attempt import Attempt

ROOT = Path(__file__).parents[3]


def start(attempt: Attempt) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "workloads.train", str(attempt.folder / "spec.json")]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def run(attempt: Attempt) -> int:
    return start(attempt).wait(100)


def progress(attempt: Attempt) -> list[dict[str, Any]]:
    path = attempt.folder / PROGRESS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(attempt: Attempt, kind: str) -> None:
    deadline = time.monotonic() + 90
    while not any(line["kind"] == kind for line in progress(attempt)):
        assert time.monotonic() < deadline, progress(attempt)
        time.sleep(0.05)


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    asked = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**asked, max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(written[0][asked["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_dataset_is_learnt_by_heart(make_attempt: Any, pairs: list[tuple[str, str]], method: str) -> None:
    attempt: Attempt = make_attempt(n_epochs=30, method=method)
    assert run(attempt) == 0

    told = progress(attempt)
    assert told[0]["kind"] == "started"
    assert told[1]["kind"] == "preparing"
    (prepared,) = [line for line in told if line["kind"] == "prepared"]
    assert (prepared["rows"], prepared["truncated_rows"], prepared["method"]) == (20, 0, method)
    steps = [line for line in told if line["kind"] == "progress"]
    assert {"step", "total_steps", "epoch", "train_loss", "eta_seconds"} <= steps[0].keys()
    assert (steps[-1]["step"], steps[-1]["total_steps"], steps[-1]["epoch"]) == (150, 150, 30.0)
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] / 10
    assert told[-1]["kind"] == "finished"

    weights = attempt.folder / WEIGHTS
    manifest = Manifest.model_validate_json((attempt.folder / MANIFEST).read_bytes())
    assert {file.path for file in manifest.files} == {f"weights/{path.name}" for path in weights.iterdir()}
    assert manifest.tokens == prepared["tokens"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(weights), AutoTokenizer.from_pretrained(weights)
    assert tokenizer.chat_template
    right = sum(answer(model, tokenizer, prompt) == completion for prompt, completion in pairs)
    assert right >= 18, f"{right} of 20 answers are right"

    before = (attempt.folder / MANIFEST).stat().st_mtime_ns
    assert run(attempt) == 0
    assert (attempt.folder / MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize("way", ["fence", "sigterm", "kill"])
def test_an_attempt_that_ends_early_leaves_no_manifest(make_attempt: Any, way: str) -> None:
    attempt: Attempt = make_attempt(n_epochs=100_000)
    process = start(attempt)
    try:
        wait_for(attempt, "progress")
        if way == "fence":
            (attempt.spec.job_dir / CURRENT_ATTEMPT).write_text("token-2")
        else:
            process.send_signal(signal.SIGTERM if way == "sigterm" else signal.SIGKILL)
        assert process.wait(60) == (-signal.SIGKILL if way == "kill" else 1)
    finally:
        process.kill()
        process.wait()
    assert not (attempt.folder / MANIFEST).exists()
    if way != "kill":
        last = progress(attempt)[-1]
        assert (last["kind"], last["code"]) == ("failed", "fenced" if way == "fence" else "stopped")


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"dataset_sha256": "0" * 64}, "dataset_changed", "upload the dataset again"),
        ({"base_model": "no-such-model"}, "base_model", "tiny-llama"),
        ({"max_length": 8}, "bad_row", "Line 1 "),
        ({"learning_rate_multiplier": 1e30, "n_epochs": 50}, "internal", "lower learning_rate_multiplier"),
    ],
)
def test_failures_say_what_to_do(make_attempt: Any, fields: dict[str, Any], code: str, says: str) -> None:
    attempt: Attempt = make_attempt(**fields)
    assert run(attempt) == 1
    last = progress(attempt)[-1]
    assert (last["kind"], last["code"]) == ("failed", code)
    assert says in last["message"]
    assert not (attempt.folder / MANIFEST).exists()


def test_an_unreadable_specification_is_refused(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "workloads.train", str(tmp_path / "spec.json")],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert result.returncode == 2
    assert b"cannot be read" in result.stderr
