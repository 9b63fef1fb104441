"""An attempt goes on where an earlier one was cut off, and never from what is damaged or another's."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workloads.specs import CHECKPOINTS, CURRENT_ATTEMPT, MANIFEST, PROGRESS, Checkpoint, Manifest
from workloads.train.attempt import Attempt
from workloads.train.checkpoints import KEPT, adopt
from workloads.train.job import train

ROOT = Path(__file__).parents[3]
EPOCHS, STEPS = 40, 200
Make = Callable[..., Attempt]


def start(attempt: Attempt, before: Callable[[], None] | None = None) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "workloads.train", str(attempt.folder / "spec.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=before,  # noqa: PLW1509 - no thread is in the way
    )


def told(attempt: Attempt) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (attempt.folder / PROGRESS).read_text().splitlines()]


def manifest(attempt: Attempt) -> Manifest:
    return Manifest.model_validate_json((attempt.folder / MANIFEST).read_bytes())


def kept(attempt: Attempt) -> list[int]:
    """The steps of its checkpoints."""
    found = [
        Checkpoint.model_validate_json(path.read_bytes()) for path in (attempt.folder / CHECKPOINTS).glob("*.json")
    ]
    return sorted(checkpoint.step for checkpoint in found)


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def following(make: Make, number: int, **fields: Any) -> Attempt:
    """The job's next attempt, which has its token."""
    attempt = make(attempt=number, token=f"token-{number}", **fields)
    (attempt.spec.job_dir / CURRENT_ATTEMPT).write_text(attempt.spec.token)
    return attempt


@pytest.fixture(params=["full"])
def cut_off(make_attempt: Make, request: pytest.FixtureRequest) -> Attempt:
    """An attempt that was killed after some checkpoints."""
    attempt = make_attempt(n_epochs=EPOCHS, checkpoint_every_s=0, method=request.param)
    process = start(attempt)
    try:
        until(lambda: len(steps := kept(attempt)) == KEPT and steps[0] > 1)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    return attempt


@pytest.mark.parametrize("cut_off", ["full", pytest.param("lora", marks=pytest.mark.real)], indirect=True)
def test_a_killed_training_goes_on_and_ends_as_if_nothing_had_been(
    make_attempt: Make, cut_off: Attempt, tmp_path: Path
) -> None:
    method = cut_off.spec.method
    second = following(make_attempt, 2, n_epochs=EPOCHS, method=method)
    from_step = kept(cut_off)[-1]
    train(second)
    lines = told(second)
    resumed = next(line for line in lines if "resumed" in line.get("message", ""))
    assert (resumed["message"], resumed["step"]) == (f"resumed from step {from_step}", from_step)
    first = next(line for line in lines if "train_loss" in line)
    assert (first["step"], first["total_steps"]) == (from_step + 1, STEPS)

    unbroken = following(make_attempt, 1, n_epochs=EPOCHS, method=method, job_dir=tmp_path / "unbroken")
    train(unbroken)
    assert manifest(second).steps == manifest(unbroken).steps == STEPS
    print(f"{method}: {manifest(second).train_loss} after a resumption, {manifest(unbroken).train_loss} without")
    assert manifest(second).train_loss == pytest.approx(manifest(unbroken).train_loss, rel=1e-4)


def test_only_what_is_whole_and_of_an_earlier_attempt_is_taken(make_attempt: Make, cut_off: Attempt) -> None:
    older, newest = kept(cut_off)
    folder = cut_off.folder / CHECKPOINTS
    (folder / f"step-{newest + 1}.pt").write_bytes(b"still being written: it has no record")
    (folder / f"step-{newest + 2}.json").write_text('{"step": ')

    second = following(make_attempt, 2, n_epochs=EPOCHS)
    taken = adopt(second)
    assert taken is not None
    assert taken.step == newest
    assert kept(second) == [newest]

    with (folder / f"step-{newest}.pt").open("r+b") as file:  # as no trainer does it, so both attempts' are spoilt
        file.seek(5000)
        file.write(b"\xff" * 64)
    third = following(make_attempt, 3, n_epochs=EPOCHS)
    taken = adopt(third)
    assert taken is not None
    assert taken.step == older

    (folder / f"step-{older}.pt").unlink()
    assert adopt(following(make_attempt, 3, n_epochs=EPOCHS)) == taken, "its own copy is nobody else's to remove"
    assert adopt(following(make_attempt, 1, job_dir=cut_off.spec.job_dir.parent / "other")) is None


def test_a_disk_that_is_full_costs_the_checkpoints_alone(make_attempt: Make) -> None:
    attempt = make_attempt(n_epochs=8, checkpoint_every_s=0)
    process = start(attempt, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6_000_000, 6_000_000)))
    assert process.wait(100) == 0
    assert manifest(attempt).steps == 40
    assert any("No checkpoint could be written" in line.get("message", "") for line in told(attempt))
    assert list((attempt.folder / CHECKPOINTS).iterdir()) == []


def test_a_short_training_keeps_none(make_attempt: Make) -> None:
    attempt = make_attempt(n_epochs=1)
    train(attempt)
    assert not (attempt.folder / CHECKPOINTS).exists()
