"""Replicas of a deployment die, fall silent and are replaced under load."""

import asyncio
from pathlib import Path

import pytest

from tests.fakes.broker import running_broker
from tests.fakes.gateways import GatewayProcess, gateways
from tests.fakes.replica import ReplicaProcess
from tests.fakes.waiting import until
from tests.gateway_faults.conftest import CLIENTS, Routes, asking, more, prepare

pytestmark = pytest.mark.timeout(110)

EJECTED = "mini_studio_gateway_ejected_replicas"
EJECT_S = 0.5


async def ejected(gateway: GatewayProcess, routes: Routes) -> float:
    return await asyncio.to_thread(gateway.metric, EJECTED, deployment=routes.name)


async def until_ejected(gateway: GatewayProcess, routes: Routes, count: int) -> None:
    async with asyncio.timeout(30):
        while await ejected(gateway, routes) != count:
            await asyncio.sleep(0.05)


async def test_a_replica_is_killed_under_load_and_comes_back(
    replicas: list[ReplicaProcess], routes: Routes, folder: Path
) -> None:
    dying, other = replicas
    with running_broker() as bootstrap:
        await prepare(bootstrap)
        await routes.publish(bootstrap, replicas)
        with gateways(bootstrap, folder, GATEWAY__EJECT_S=EJECT_S) as [gateway]:
            async with asking(gateway.url) as load:
                await until(lambda: load.pids[dying.pid] > 20 and load.pids[other.pid] > 20)
                killed = dying.pid
                dying.end()
                await until_ejected(gateway, routes, 1)
                await until(more(lambda: load.pids[other.pid]))
                answered = load.pids[killed]
                dying.start()
                await until_ejected(gateway, routes, 0)
                await until(more(lambda: load.pids[dying.pid]))
    assert load.pids[killed] == answered
    failed = sum(count for status, count in load.statuses.items() if status != 200)
    # Only what the dead one had already may have failed: whether it began to work on that, nobody can know.
    assert failed <= CLIENTS
    assert set(load.statuses) <= {200, 502}


async def test_a_replica_that_takes_no_connection_costs_nobody_an_error(
    replicas: list[ReplicaProcess], routes: Routes, folder: Path
) -> None:
    dead, other = replicas
    dead.end()
    with running_broker() as bootstrap:
        await prepare(bootstrap)
        await routes.publish(bootstrap, replicas)
        with gateways(bootstrap, folder, GATEWAY__EJECT_S=EJECT_S) as [gateway]:
            async with asking(gateway.url) as load:
                await until(more(lambda: load.pids[other.pid], 100))
                await until_ejected(gateway, routes, 1)
    assert set(load.statuses) == {200}


@pytest.mark.parametrize("client", ["fast", "plain"])
async def test_a_replica_that_is_silent_is_ejected_and_others_go_on(
    replicas: list[ReplicaProcess], routes: Routes, folder: Path, client: str
) -> None:
    silent, other = replicas
    with running_broker() as bootstrap:
        await prepare(bootstrap)
        await routes.publish(bootstrap, replicas)
        settings = {"GATEWAY__EJECT_S": 2, "GATEWAY__FIRST_BYTE_S": 1, "GATEWAY__CLIENT": client}
        with gateways(bootstrap, folder, **settings) as [gateway]:
            async with asking(gateway.url) as load:
                await until(lambda: load.pids[silent.pid] > 20)
                silent.stop()
                await until(lambda: load.statuses[504] >= 3)
                await until_ejected(gateway, routes, 1)
                await until(more(lambda: load.pids[other.pid], 50))
                silent.go_on()
                await until_ejected(gateway, routes, 0)
                await until(more(lambda: load.pids[silent.pid]))
    assert set(load.statuses) == {200, 504}
    assert load.statuses[504] <= 4 * CLIENTS


async def test_replicas_are_replaced_one_by_one_and_no_request_is_lost(
    replicas: list[ReplicaProcess], routes: Routes, folder: Path
) -> None:
    started = list(replicas)
    serving = list(replicas)
    try:
        with running_broker() as bootstrap:
            await prepare(bootstrap)
            await routes.publish(bootstrap, serving)
            with gateways(bootstrap, folder) as [gateway]:
                async with asking(gateway.url) as load:
                    for _ in range(2):
                        started.append(ReplicaProcess())
                        new, old = started[-1], serving[0]
                        serving = [*serving[1:], new]
                        await routes.publish(bootstrap, serving)
                        await until(more(lambda new=new: load.pids[new.pid]))
                        # Once an answer of the new one is there, nobody is given the old one any more.
                        before = load.pids[old.pid]
                        await until(more(lambda new=new: load.pids[new.pid], 50))
                        assert load.pids[old.pid] <= before + CLIENTS
                        old.end()
                    await until(more(lambda: load.statuses[200], 100))
        assert set(load.statuses) == {200}
    finally:
        for replica in started:
            replica.end()
