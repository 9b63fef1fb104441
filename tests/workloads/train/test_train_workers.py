"""Two workers on a real Ray head that wants a token: the curve of one worker, a lost worker, the fence."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psutil
import pytest

from mini_studio.drivers.ports import RunState, Workers
from mini_studio.drivers.ray import RayCluster
from tests.fakes.ray_head import RayHead, running_head
from workloads.specs import CHECKPOINTS, CURRENT_ATTEMPT, MANIFEST, PROGRESS, SPEC, Manifest
from workloads.train.attempt import Attempt
from workloads.train.job import train

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]

TOLERANCE = 1e-4
BUSY_S = 240.0
"""How long a start of two workers may take on a busy machine; a quiet one needs a tenth."""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with running_head("a-token-of-the-tests") as head:
        yield head


@pytest.fixture
async def cluster(head: RayHead) -> AsyncIterator[RayCluster]:
    cluster = RayCluster(head.address, timeout_s=60, token=head.token)
    yield cluster
    await cluster.aclose()


def told(attempt: Attempt) -> list[dict[str, Any]]:
    path = attempt.folder / PROGRESS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(attempt: Attempt) -> dict[int, float]:
    return {line["step"]: line["train_loss"] for line in told(attempt) if "train_loss" in line}


async def submitted(attempt: Attempt, cluster: RayCluster) -> str:
    id = f"job-{abs(hash(str(attempt.folder))):x}"
    await cluster.submit(id, attempt.folder / SPEC, workers=Workers(attempt.spec.workers), metadata={})
    return id


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + BUSY_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


async def ended(id: str, cluster: RayCluster) -> RunState:
    deadline = time.monotonic() + BUSY_S
    while (report := await cluster.report(id)).state in (RunState.PENDING, RunState.RUNNING):
        assert time.monotonic() < deadline, await cluster.logs(id, 50)
        await asyncio.sleep(0.2)
    return report.state


async def test_two_workers_have_the_curve_of_one(
    make_attempt: Any, rows_file: Any, pairs: list[tuple[str, str]], cluster: RayCluster, tmp_path: Any
) -> None:
    rows = rows_file([{"prompt": prompt, "completion": completion} for prompt, completion in pairs[:19]])
    spec = {
        "dataset_path": rows,
        "n_epochs": 5,
        "batch_size": 6,
        "progress_every_s": 0.0001,
    }  # the last batch has one row
    alone: Attempt = make_attempt(**spec, job_dir=tmp_path / "alone")
    (alone.spec.job_dir / CURRENT_ATTEMPT).write_text(alone.spec.token)
    train(alone)

    attempt: Attempt = make_attempt(**spec, workers=2)
    started = time.monotonic()
    id = await submitted(attempt, cluster)
    assert await ended(id, cluster) is RunState.SUCCEEDED, await cluster.logs(id, 50)
    one, two = losses(alone), losses(attempt)
    assert list(one) == list(two) == list(range(1, 21))
    off = max(abs(one[step] - two[step]) / one[step] for step in one)
    print(f"the losses differ by up to {off:.1e}; {time.monotonic() - started:.0f} s")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=TOLERANCE, abs=2e-5)  # they are told to 5 digits
    manifests = [Manifest.model_validate_json((a.folder / MANIFEST).read_bytes()) for a in (alone, attempt)]
    assert manifests[1].train_loss == pytest.approx(manifests[0].train_loss, rel=TOLERANCE)
    assert [file.path for file in manifests[1].files] == [file.path for file in manifests[0].files]
    assert not (attempt.folder / "ray").exists()


async def test_a_lost_worker_ends_the_attempt_and_the_next_goes_on(
    make_attempt: Any, cluster: RayCluster, head: RayHead
) -> None:
    spec = {"n_epochs": 20_000, "checkpoint_every_s": 0.2, "workers": 2}
    first: Attempt = make_attempt(**spec)
    id = await submitted(first, cluster)
    await until(lambda: len(list((first.folder / CHECKPOINTS).glob("*.json"))) == 2)
    workers = head.named("RayTrainWorker")
    assert len(workers) == 2, [worker.cmdline() for worker in workers]
    workers[1].kill()
    assert await ended(id, cluster) is RunState.FAILED
    assert told(first)[-1]["code"] == "lost_worker", told(first)[-3:]
    left = max(int(path.stem.partition("-")[2]) for path in (first.folder / CHECKPOINTS).glob("*.json"))

    second: Attempt = make_attempt(**spec, attempt=2, token="token-2")
    fence = second.spec.job_dir / CURRENT_ATTEMPT
    fence.write_text("token-2")
    id = await submitted(second, cluster)
    await until(lambda: losses(second))
    assert next(iter(losses(second))) == left + 1
    assert any(line.get("message") == f"resumed from step {left}" for line in told(second))

    trainers = head.named("RayTrainWorker", "workloads.train")
    fence.write_text("token-3")
    assert await ended(id, cluster) is RunState.FAILED
    assert told(second)[-1]["code"] == "fenced"
    _, alive = await asyncio.to_thread(psutil.wait_procs, trainers, 30)
    assert not alive, "all that trained is gone"
