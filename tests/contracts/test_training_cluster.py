"""The training cluster contract, run on a real Ray head that wants a token, on the stand-in for its HTTP API, and on the fake.

A Ray head without authentication has it too, in `make test-real`.
"""

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mini_studio.drivers.ports import RunReport, RunState, TrainingCluster, Workers
from mini_studio.drivers.ray import RayCluster
from mini_studio.errors import Refused
from tests.fakes.jobs_server import running_jobs_server
from tests.fakes.ray_head import RayHead, running_head, stub_trainer
from tests.fakes.training_cluster import FakeTrainingCluster

METADATA = {"job_id": "job_1", "attempt": "1"}


class Bench(ABC):
    """A cluster, and a way to end what runs on it."""

    cluster: TrainingCluster

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def spec(self, *say: str) -> Path:
        file = self.folder / "a spec's.json"  # what a shell would break
        file.write_text(json.dumps({"say": say}))
        return file

    @abstractmethod
    def end(self, id: str, spec: Path, exit_code: int) -> None: ...

    async def submit(self, id: str, spec: Path, metadata: dict[str, str] = METADATA) -> None:
        await self.cluster.submit(id, spec, workers=Workers(), metadata=metadata)

    async def until(self, id: str, state: RunState) -> RunReport:
        for _ in range(600):
            report = await self.cluster.report(id)
            if report.state is state:
                return report
            await asyncio.sleep(0.1)
        raise AssertionError(f"{id} stayed {report}")


class FakeBench(Bench):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cluster: FakeTrainingCluster = FakeTrainingCluster(cpus=2.0)

    def end(self, id: str, spec: Path, exit_code: int) -> None:
        if exit_code == 0:
            self.cluster.finish(id)
        else:
            self.cluster.fail(id, exit_code, json.loads(spec.read_text())["say"])


class RayBench(Bench):
    def __init__(self, folder: Path, address: str, token: str | None = None) -> None:
        super().__init__(folder)
        self.cluster = RayCluster(address, timeout_s=30, token=token, **stub_trainer())

    def end(self, id: str, spec: Path, exit_code: int) -> None:
        Path(f"{spec}.exit").write_text(str(exit_code))


@pytest.fixture(scope="module")
def jobs_server() -> Iterator[str]:
    with running_jobs_server() as address:
        yield address


@pytest.fixture(scope="module")
def open_ray_head() -> Iterator[RayHead]:
    with running_head() as head:
        yield head


@pytest.fixture(params=["fake", "jobs server", "ray", pytest.param("open ray", marks=pytest.mark.real)])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    if request.param == "fake":
        yield FakeBench(tmp_path)
        return
    if request.param in ("ray", "open ray"):
        head: RayHead = request.getfixturevalue("ray_head" if request.param == "ray" else "open_ray_head")
        bench = RayBench(tmp_path, head.address, head.token)
    else:
        bench = RayBench(tmp_path, request.getfixturevalue("jobs_server"))
    yield bench
    await bench.cluster.aclose()  # type: ignore[attr-defined]


@pytest.fixture
def id(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Unique in the session: one Ray head serves all tests."""
    return f"job-{abs(hash(str(tmp_path))):x}-1"


async def test_a_run_that_ends_well_has_succeeded(bench: Bench, id: str) -> None:
    spec = bench.spec()
    await bench.submit(id, spec)
    await bench.until(id, RunState.RUNNING)
    bench.end(id, spec, 0)
    await bench.until(id, RunState.SUCCEEDED)


async def test_a_run_that_ends_badly_has_failed_and_its_log_says_why(bench: Bench, id: str) -> None:
    spec = bench.spec(*(f'line {n} \\n "ü"' for n in range(30)))
    await bench.submit(id, spec)
    await bench.until(id, RunState.RUNNING)
    bench.end(id, spec, 7)
    report = await bench.until(id, RunState.FAILED)
    assert "exit code 7" in report.message
    assert await bench.cluster.logs(id, 2) == ['line 28 \\n "ü"', 'line 29 \\n "ü"']
    assert len(await bench.cluster.logs(id, 1000)) == 30


async def test_submitting_again_is_success_and_one_run(bench: Bench, id: str) -> None:
    spec = bench.spec()
    await asyncio.gather(*(bench.submit(id, spec) for _ in range(8)))
    await bench.until(id, RunState.RUNNING)
    await bench.submit(id, spec)
    bench.end(id, spec, 0)
    await bench.until(id, RunState.SUCCEEDED)
    await bench.submit(id, spec)
    assert (await bench.cluster.report(id)).state is RunState.SUCCEEDED


async def test_anothers_submission_id_is_refused(bench: Bench, id: str) -> None:
    spec = bench.spec()
    await bench.submit(id, spec)
    with pytest.raises(Refused, match="another job"):
        await bench.submit(id, spec, {"job_id": "job_2", "attempt": "1"})
    bench.end(id, spec, 0)


async def test_a_stopped_run_is_stopped(bench: Bench, id: str) -> None:
    await bench.submit(id, bench.spec())
    await bench.until(id, RunState.RUNNING)
    await bench.cluster.stop(id)
    await bench.until(id, RunState.STOPPED)
    await bench.cluster.stop(id)


async def test_a_run_that_was_stopped_is_not_started_by_the_same_submission(bench: Bench, id: str) -> None:
    spec = bench.spec()
    await bench.submit(id, spec)
    await bench.until(id, RunState.RUNNING)
    await bench.cluster.stop(id)
    await bench.until(id, RunState.STOPPED)
    await bench.submit(id, spec)
    assert (await bench.cluster.report(id)).state is RunState.STOPPED


async def test_a_run_that_has_ended_is_not_stopped_any_more(bench: Bench, id: str) -> None:
    spec = bench.spec()
    await bench.submit(id, spec)
    await bench.until(id, RunState.RUNNING)
    bench.end(id, spec, 0)
    await bench.until(id, RunState.SUCCEEDED)
    await bench.cluster.stop(id)
    assert (await bench.cluster.report(id)).state is RunState.SUCCEEDED


async def test_what_it_does_not_know_is_lost(bench: Bench) -> None:
    assert (await bench.cluster.report("never")).state is RunState.LOST
    await bench.cluster.stop("never")
    assert await bench.cluster.logs("never", 10) == []


async def test_only_what_fits_has_room(bench: Bench) -> None:
    for _ in range(300):  # a cluster goes on counting for some seconds what has ended
        if room := await bench.cluster.has_room(Workers(cpus=0.5), running=1):
            break
        await asyncio.sleep(0.1)
    assert room
    assert not await bench.cluster.has_room(Workers(), running=2), "those may not be in the cluster's own count yet"
    for never in (Workers(cpus=3), Workers(count=3), Workers(gpus=1)):
        with pytest.raises(Refused):
            await bench.cluster.has_room(never, running=0)


async def test_status_tells_resources(bench: Bench) -> None:
    status = await bench.cluster.status()
    assert (status["available"], status["reason"], status["nodes"]) == (True, None, 1)
    assert set(status["resources"]) == {"cpu", "gpu", "memory_bytes"}
    assert status["resources"]["cpu"]["total"] == 2.0
    assert status["resources"]["memory_bytes"]["total"] > 0
