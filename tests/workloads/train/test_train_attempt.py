"""The attempt's folder: progress, fence, manifest."""

import hashlib
import json
import threading
from typing import Any

import pytest

from workloads.specs import CURRENT_ATTEMPT, MANIFEST, PROGRESS, Manifest, Progress
from workloads.train.attempt import HEARTBEAT, Attempt
from workloads.train.errors import Stopped, TrainingFailure, explained


def lines(attempt: Attempt) -> list[Progress]:
    return [Progress.model_validate_json(line) for line in (attempt.folder / PROGRESS).read_bytes().splitlines()]


def test_progress_is_appended_after_a_torn_line(make_attempt: Any) -> None:
    attempt: Attempt = make_attempt()
    (attempt.folder / PROGRESS).write_text('{"kind": "star')
    attempt.say(kind="started")
    attempt.preparing("loading")
    torn, first, second = (attempt.folder / PROGRESS).read_text().splitlines()
    assert torn == '{"kind": "star'
    assert json.loads(first)["kind"] == "started"
    assert json.loads(second)["message"] == "loading"


@pytest.mark.parametrize("change", ["another", "gone"])
def test_a_fenced_attempt_says_so_and_stops(make_attempt: Any, change: str) -> None:
    attempt: Attempt = make_attempt()
    stopped = threading.Event()
    codes: list[int] = []

    def stop(code: int) -> None:
        codes.append(code)
        stopped.set()

    fence = attempt.spec.job_dir / CURRENT_ATTEMPT
    if change == "gone":
        fence.unlink()
    else:
        fence.write_text("token-2")
    attempt.watch(stop)
    assert stopped.wait(30)
    assert codes == [1]
    assert lines(attempt)[-1].code == "fenced"


def test_a_living_attempt_shows_it(make_attempt: Any) -> None:
    attempt: Attempt = make_attempt()
    attempt.watch(lambda _code: None)
    assert (attempt.folder / HEARTBEAT).exists()
    (attempt.spec.job_dir / CURRENT_ATTEMPT).write_text("end of test")


def test_the_manifest_names_every_file_with_its_hash(make_attempt: Any) -> None:
    attempt: Attempt = make_attempt()
    weights = attempt.folder / "weights"
    weights.mkdir()
    (weights / "a.bin").write_bytes(b"abc")
    assert not attempt.complete()
    attempt.commit(weights=weights, train_loss=0.5, steps=3, tokens=9)
    manifest = Manifest.model_validate_json((attempt.folder / MANIFEST).read_bytes())
    (file,) = manifest.files
    assert (file.path, file.size_bytes) == ("weights/a.bin", 3)
    assert file.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert (manifest.token, manifest.steps, manifest.tokens) == ("token-1", 3, 9)
    assert attempt.complete()


def test_a_fenced_attempt_commits_nothing(make_attempt: Any) -> None:
    attempt: Attempt = make_attempt()
    weights = attempt.folder / "weights"
    weights.mkdir()
    (attempt.spec.job_dir / CURRENT_ATTEMPT).write_text("token-2")
    with pytest.raises(TrainingFailure) as failure:
        attempt.commit(weights=weights, train_loss=0.5, steps=3, tokens=9)
    assert failure.value.code == "fenced"
    assert not (attempt.folder / MANIFEST).exists()


def test_another_attempts_manifest_is_not_this_ones(make_attempt: Any) -> None:
    attempt: Attempt = make_attempt()
    attempt.commit(weights=attempt.folder, train_loss=0.5, steps=3, tokens=9)
    assert not make_attempt(token="token-2").complete()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (MemoryError(), "out_of_memory", "smaller batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out_of_memory", "smaller batch_size"),
        (OSError(28, "No space left on device", "/models"), "no_space", "make room"),
        (Stopped(), "stopped", "asked to stop"),
        (ZeroDivisionError("x"), "internal", "ZeroDivisionError: x"),
        (TrainingFailure("bad_row", "Line 3"), "bad_row", "Line 3"),
    ],
)
def test_failures_are_explained(error: BaseException, code: str, says: str) -> None:
    failure = explained(error)
    assert failure.code == code
    assert says in str(failure)
