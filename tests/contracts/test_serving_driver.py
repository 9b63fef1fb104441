"""The serving driver contract, run on the local processes, on a real Kubernetes, and on the fake."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from events.types import DeploymentKind
from mini_studio.drivers.kubernetes.driver import KubernetesDriver
from mini_studio.drivers.local_process import LocalProcessDriver
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState, ServingDriver
from mini_studio.errors import Conflict, Unavailable
from mini_studio.settings import Kubernetes, Serving
from tests.fakes.local_servers import all_servers, end_all, stub_command
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.serving_driver import FakeServingDriver

DEPLOYMENT = "dep_" + "1" * 24
OTHER = "dep_" + "2" * 24


@dataclass
class Bench:
    driver: ServingDriver
    models_root: Path
    state_dir: Path

    def spec(self, name: str = "vllm-base-tiny", **changes: object) -> ReleaseSpec:
        spec = ReleaseSpec(
            name=name,
            deployment_id=DEPLOYMENT,
            generation=1,
            kind=DeploymentKind.BASE,
            client_code="",
            model="tiny",
            base_model="tiny",
            weights_path=None,
            gpu_count=0,
            min_replicas=1,
            max_replicas=1,
            prometheus_threshold=5,
        )
        return replace(spec, **changes)  # type: ignore[arg-type]

    async def remove(self, name: str, deployment_id: str, generation: int) -> None:
        """Remove until all of it is gone."""
        for _ in range(600):
            with contextlib.suppress(Unavailable):
                await self.driver.remove(name, deployment_id, generation)
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{name} never went")

    async def settle(self, name: str, spec: ReleaseSpec | None = None) -> ReleaseReport:
        """Reconcile until it is ready or has failed."""
        for _ in range(600):
            if spec is not None:
                await self.driver.apply(spec)
            report = await self.driver.observe(name)
            if report is not None and report.state is not ReleaseState.STARTING:
                return report
            await asyncio.sleep(0.05)
        raise AssertionError(f"never settled: {report}")


@pytest.fixture(params=["fake", "local_process", pytest.param("kubernetes", marks=pytest.mark.real)])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    models_root, state_dir = tmp_path / "models", tmp_path / "serving"
    models_root.mkdir()
    if request.param == "fake":
        yield Bench(FakeServingDriver(), models_root, state_dir)
        return
    if request.param == "kubernetes":
        cluster: RealKubernetes = request.getfixturevalue("real_cluster")
        with cluster.namespace() as namespace:
            settings = Kubernetes(namespace=namespace, kubeconfig=cluster.kubeconfig, runtime="studio")
            on_cluster = KubernetesDriver(models_root, Serving(kubernetes=settings))
            yield Bench(on_cluster, models_root, state_dir)
            await on_cluster.aclose()
        return
    driver = LocalProcessDriver(state_dir, models_root, Serving(threads=1), command=stub_command, backoff_s=0.01)
    yield Bench(driver, models_root, state_dir)
    await driver.aclose()
    await asyncio.to_thread(end_all, state_dir)


async def test_what_is_applied_becomes_ready(bench: Bench) -> None:
    spec = bench.spec()
    await bench.driver.apply(spec)
    report = await bench.settle(spec.name)
    assert (report.state, report.replicas, len(report.endpoints)) == (ReleaseState.READY, 1, 1)
    assert (report.name, report.deployment_id, report.generation) == (spec.name, DEPLOYMENT, 1)


async def test_applying_again_changes_nothing(bench: Bench) -> None:
    spec = bench.spec()
    first = await bench.settle(spec.name, spec)
    await asyncio.gather(*(bench.driver.apply(spec) for _ in range(5)))
    assert await bench.driver.observe(spec.name) == first


async def test_asked_replicas_run(bench: Bench) -> None:
    spec = bench.spec(min_replicas=2, max_replicas=2)
    for _ in range(600):
        await bench.driver.apply(spec)
        report = await bench.driver.observe(spec.name)
        if report and report.replicas == 2:
            break
        await asyncio.sleep(0.05)
    assert report is not None
    assert report.replicas == 2
    assert len(set(report.endpoints)) == (2 if isinstance(bench.driver, LocalProcessDriver) else 1)


async def test_nothing_is_known_of_what_was_never_applied(bench: Bench) -> None:
    assert await bench.driver.observe("never") is None
    assert [report async for report in bench.driver.list()] == []
    await bench.remove("never", DEPLOYMENT, 1)


async def test_a_newer_generation_takes_over(bench: Bench) -> None:
    spec = bench.spec()
    await bench.settle(spec.name, spec)
    newer = replace(spec, generation=2, base_model="other")
    report = await bench.settle(spec.name, newer)
    assert (report.state, report.generation) == (ReleaseState.READY, 2)


async def test_an_older_generation_is_a_conflict(bench: Bench) -> None:
    spec = bench.spec(generation=2)
    await bench.driver.apply(spec)
    with pytest.raises(Conflict):
        await bench.driver.apply(replace(spec, generation=1))


async def test_a_name_belongs_to_one_deployment(bench: Bench) -> None:
    spec = bench.spec()
    await bench.driver.apply(spec)
    with pytest.raises(Conflict):
        await bench.driver.apply(replace(spec, deployment_id=OTHER, generation=5))
    await bench.remove(spec.name, OTHER, 5)
    assert await bench.driver.observe(spec.name) is not None


async def test_remove_leaves_nothing(bench: Bench) -> None:
    spec = bench.spec()
    await bench.settle(spec.name, spec)
    await bench.remove(spec.name, DEPLOYMENT, 1)
    await bench.remove(spec.name, DEPLOYMENT, 1)
    assert await bench.driver.observe(spec.name) is None
    assert [report async for report in bench.driver.list()] == []
    assert all_servers(bench.state_dir) == []


async def test_a_late_removal_spares_its_successor(bench: Bench) -> None:
    spec = bench.spec(generation=3)
    await bench.driver.apply(spec)
    await bench.remove(spec.name, DEPLOYMENT, 2)
    assert (await bench.settle(spec.name)).state is ReleaseState.READY


async def test_a_removed_name_is_free(bench: Bench) -> None:
    spec = bench.spec()
    await bench.driver.apply(spec)
    await bench.remove(spec.name, DEPLOYMENT, 2)
    await bench.driver.apply(replace(spec, deployment_id=OTHER))
    assert (await bench.settle(spec.name)).deployment_id == OTHER


async def test_waking_what_is_awake_unknown_or_anothers_changes_nothing(bench: Bench) -> None:
    spec = bench.spec(min_replicas=0)
    before = await bench.settle(spec.name, spec)
    assert (before.state, before.replicas) == (ReleaseState.READY, 1), "it has to become ready before it may sleep"
    for name, id in ((spec.name, spec.deployment_id), (spec.name, OTHER), ("never", OTHER), ("../x", OTHER)):
        await bench.driver.wake(name, id)
    await bench.driver.apply(spec)
    assert await bench.driver.observe(spec.name) == before
    assert [report.name async for report in bench.driver.list()] == [spec.name]


async def test_lists_all(bench: Bench) -> None:
    for name in ("b", "a"):
        await bench.driver.apply(bench.spec(name, deployment_id="dep_" + name * 24))
    assert [report.name async for report in bench.driver.list()] == ["a", "b"]
