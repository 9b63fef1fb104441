"""The local processes follow the load at the gateways: more, fewer, none, and none that breaks off what it answers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from events.types import DeploymentKind
from mini_studio.drivers.local_process import LocalProcessDriver
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.drivers.slots import SCALE
from mini_studio.errors import Refused
from mini_studio.settings import Serving
from tests.fakes.broker import free_port
from tests.fakes.load_gateway import LoadGateway, load_gateway
from tests.fakes.local_servers import all_servers, end_all, reconciled, stub_command
from tests.fakes.waiting import until as come_true

SPEC = ReleaseSpec(
    "vllm-base-tiny", "dep_" + "1" * 24, 1, DeploymentKind.BASE, "", "tiny", "tiny", None, 0, 0, 3, prometheus_threshold=2
)  # fmt: skip
READY = ReleaseState.READY


class Place:
    """A state folder, a gateway, and the drivers that come and go between them."""

    def __init__(self, root: Path, gateway: LoadGateway) -> None:
        self.state_dir, self.models_root, self.gateway = root / "serving", root / "models", gateway
        self.models_root.mkdir()

    def driver(
        self,
        *,
        gateways: list[str] | None = None,
        scale_down_s: float = 0.0,
        drain_s: float = 0.1,
        max_servers: int = 8,
    ) -> LocalProcessDriver:
        settings = Serving(threads=1, poll_s=0.02, scale_down_s=scale_down_s, max_servers=max_servers)
        return LocalProcessDriver(
            self.state_dir, self.models_root, settings, command=stub_command, backoff_s=0.01, drain_s=drain_s,
            gateways=[self.gateway.url] if gateways is None else gateways,
        )  # fmt: skip

    def servers(self) -> list[int]:
        return all_servers(self.state_dir)

    def needs(self, requests: float) -> None:
        self.gateway.requests = {SPEC.name: requests, "another": 50}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with load_gateway() as gateway:
        place = Place(tmp_path, gateway)
        yield place
    await asyncio.to_thread(end_all, place.state_dir)


async def until(
    driver: LocalProcessDriver, reached: Callable[[ReleaseReport], bool], spec: ReleaseSpec = SPEC
) -> ReleaseReport:
    """Reconcile until the report is so."""
    return await reconciled(driver, spec, reached)


def replicas(number: int) -> Callable[[ReleaseReport], bool]:
    return lambda report: report.state is READY and (report.replicas, len(report.endpoints)) == (number, number)


async def test_replicas_follow_the_load_down_to_none_and_up_again(place: Place) -> None:
    driver = place.driver()
    place.needs(1)
    await until(driver, replicas(1))
    place.needs(5)
    three = await until(driver, replicas(3))
    assert len(set(three.endpoints)) == 3
    place.needs(4)
    two = await until(driver, replicas(2))
    assert set(two.endpoints) < set(three.endpoints)
    place.needs(0)
    asleep = await until(driver, replicas(0))
    assert asleep.message == "It sleeps; a request wakes it."
    await until(driver, lambda _: not place.servers())
    place.needs(3)
    await until(driver, replicas(2))


async def test_no_request_takes_the_machine_from_all_others(place: Place) -> None:
    driver, other = place.driver(max_servers=3), replace(SPEC, name="vllm-base-other", deployment_id="dep_" + "3" * 24)
    await driver.apply(replace(SPEC, min_replicas=1))
    with pytest.raises(Refused, match="needs 3 model servers and this machine has room for 2 more"):
        await driver.apply(replace(other, min_replicas=3))
    assert len(place.servers()) == 1
    assert await driver.observe(other.name) is None
    await driver.apply(replace(other, min_replicas=1))
    place.needs(50)
    await until(driver, replicas(2), replace(SPEC, min_replicas=1))
    assert len(place.servers()) == 3


async def test_what_was_never_asked_for_becomes_ready_before_it_sleeps(place: Place) -> None:
    driver = place.driver()
    await driver.apply(SPEC)
    [_] = place.servers()
    assert (await until(driver, lambda report: report.state is READY)).replicas <= 1
    await until(driver, replicas(0))


async def test_a_wake_up_starts_it_without_a_look_at_the_gateways(place: Place) -> None:
    driver = place.driver()
    await until(driver, replicas(0))
    await until(driver, lambda _: not place.servers())
    unaware = place.driver(gateways=[f"http://127.0.0.1:{free_port()}"])
    await unaware.apply(SPEC)
    assert place.servers() == []
    await unaware.wake(SPEC.name, "dep_" + "2" * 24)
    await unaware.apply(SPEC)
    assert place.servers() == [], "another deployment's"
    await unaware.wake(SPEC.name, SPEC.deployment_id)
    await unaware.apply(SPEC)
    assert len(place.servers()) == 1
    await until(unaware, replicas(1))
    await driver.aclose()


@pytest.mark.parametrize("trouble", ["refuses", "is broken", "is not named"])
async def test_a_gateway_that_says_nothing_takes_no_replica_away(place: Place, trouble: str) -> None:
    place.needs(3)
    await until(place.driver(), replicas(2))
    place.needs(0)
    place.gateway.status = 500 if trouble == "is broken" else 200
    silent = {"refuses": [place.gateway.url, f"http://127.0.0.1:{free_port()}"], "is not named": []}
    driver = place.driver(gateways=silent.get(trouble, [place.gateway.url]))
    for _ in range(10):
        await until(driver, replicas(2))
        await asyncio.sleep(0.03)


async def test_replicas_stay_for_the_cool_down_also_under_a_new_driver(place: Place) -> None:
    place.needs(5)
    await until(place.driver(), replicas(3))
    place.needs(0)
    patient = place.driver(scale_down_s=3600)
    for _ in range(10):
        await until(patient, replicas(3))
        await asyncio.sleep(0.03)


async def test_a_new_driver_goes_on_with_the_number_that_was_decided(place: Place) -> None:
    place.needs(5)
    before = await until(place.driver(), replicas(3))
    assert await place.driver(gateways=[]).observe(SPEC.name) == before
    assert await until(place.driver(gateways=[]), replicas(3)) == before
    assert len(place.servers()) == 3


async def test_an_answer_that_runs_at_a_replica_taken_away_ends_whole(place: Place, tmp_path: Path) -> None:
    driver, told = place.driver(), tmp_path / "told"
    place.needs(4)
    both = await until(driver, replicas(2))
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        answers = [asyncio.create_task(client.post(url, content=str(told))) for url in both.endpoints]
        await asyncio.sleep(0.2)  # they have begun
        place.needs(1)
        [left] = (await until(driver, replicas(1))).endpoints
        [gone] = {*both.endpoints} - {left}

        async def refused() -> bool:
            try:
                await client.get(gone)
            except httpx.NetworkError:  # one that waited to be taken while the socket was closed is reset
                return True
            return False

        for _ in range(500):
            await driver.apply(SPEC)
            if await refused():
                break
            await asyncio.sleep(0.02)
        assert len(place.servers()) == 2, "it takes nothing new, and is there for what it answers"
        assert not any(answer.done() for answer in answers)
        told.touch()
        assert [answer.text.strip(".") for answer in await asyncio.gather(*answers)] == ["end", "end"]
    await until(driver, lambda _: len(place.servers()) == 1)


async def test_a_replica_that_is_needed_again_before_it_ended_goes_on(place: Place) -> None:
    driver = place.driver(drain_s=3600)
    place.needs(4)
    both = await until(driver, replicas(2))
    pids = sorted(place.servers())
    place.needs(1)
    await until(driver, replicas(1))
    place.needs(4)
    assert (await until(driver, replicas(2))).endpoints == both.endpoints
    assert sorted(place.servers()) == pids


async def test_a_sleeping_release_whose_content_changes_is_tried(place: Place) -> None:
    driver = place.driver(scale_down_s=0.0)
    await until(driver, replicas(0))
    newer = replace(SPEC, generation=2, base_model="other")
    await driver.apply(newer)
    report = await driver.observe(SPEC.name)
    assert report is not None and (report.generation, report.state) == (2, ReleaseState.STARTING)
    await until(driver, replicas(0), newer)


async def test_a_folder_of_a_version_that_did_not_scale_is_taken_over(place: Place) -> None:
    fixed = replace(SPEC, min_replicas=2, max_replicas=2)
    driver = place.driver(gateways=[])
    before = await until(driver, replicas(2), fixed)
    [file] = place.state_dir.rglob(SCALE)
    file.unlink()
    again = place.driver(gateways=[])
    assert await until(again, replicas(2), fixed) == before
    file.unlink()
    await until(again, replicas(1), replace(fixed, generation=2, min_replicas=1, max_replicas=1))
    await until(
        again, lambda _: len(place.servers()) == 1, replace(fixed, generation=2, min_replicas=1, max_replicas=1)
    )


async def test_nobody_is_asked_for_a_release_that_does_not_scale(place: Place) -> None:
    fixed = replace(SPEC, min_replicas=1, max_replicas=1)
    await until(place.driver(), replicas(1), fixed)
    assert place.gateway.asked == 0
    await come_true(lambda: len(place.servers()) == 1, 10)
