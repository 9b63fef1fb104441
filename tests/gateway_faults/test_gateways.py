"""One of two gateways is killed, and the broker is away for a while."""

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.fakes.broker import broker_process, free_port, running_broker
from tests.fakes.gateways import GatewayProcess, gateways
from tests.fakes.real_kafka import own_kafka
from tests.fakes.replica import ReplicaProcess
from tests.fakes.waiting import until
from tests.gateway_faults.conftest import Routes, asking, more, prepare

pytestmark = pytest.mark.timeout(110)


async def health(gateway: GatewayProcess, status: str) -> None:
    """Return when it says so."""
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=gateway.url, trust_env=False, timeout=10) as client:
        while (await client.get("/health")).json()["status"] != status:
            await asyncio.sleep(0.1)


async def test_one_of_two_gateways_is_killed(replicas: list[ReplicaProcess], routes: Routes, folder: Path) -> None:
    with running_broker() as bootstrap:
        await prepare(bootstrap)
        await routes.publish(bootstrap, replicas)
        with gateways(bootstrap, folder, 2) as [dying, other]:
            async with asking(dying.url) as cut_off, asking(other.url) as load:
                await until(lambda: cut_off.statuses[200] > 20 and load.statuses[200] > 20)
                dying.kill()
                await until(more(lambda: load.statuses[200], 100))
                dying.start()
                await until(more(lambda: cut_off.statuses[200]))
    assert set(load.statuses) == {200}
    assert len(cut_off.statuses) > 1, "its own clients had noticed"


async def test_the_broker_is_away_for_a_while(
    replicas: list[ReplicaProcess], routes: Routes, folder: Path, broker_port: int
) -> None:
    first, second = replicas
    epoch = folder / "run" / "broker-epoch"
    epoch.parent.mkdir(parents=True)
    epoch.touch()
    with broker_process(broker_port) as (bootstrap, broker):
        await prepare(bootstrap)
        await routes.publish(bootstrap, [first])
        with gateways(bootstrap, folder, KAFKA__REFILL=True) as [gateway]:
            async with asking(gateway.url) as load:
                await until(lambda: load.pids[first.pid] > 20)
                broker.kill()
                broker.wait()
                await health(gateway, "degraded")
                await until(more(lambda: load.pids[first.pid], 100))
                with broker_process(broker_port):
                    # It is a new one, with nothing in it; the launcher says so.
                    epoch.unlink()
                    epoch.touch()
                    await prepare(bootstrap)
                    await health(gateway, "ok")
                    await until(more(lambda: load.pids[first.pid], 100))
                    await routes.publish(bootstrap, [second])
                    await until(more(lambda: load.pids[second.pid], 50))
    assert set(load.statuses) == {200}
    assert set(load.pids) == {first.pid, second.pid}


@pytest.mark.real
async def test_apache_kafka_is_killed_and_a_gateway_without_a_record_store_reads_its_log(
    replicas: list[ReplicaProcess], routes: Routes, folder: Path, tmp_path: Path
) -> None:
    first, second = replicas
    folder.mkdir()
    nowhere = {"RECORDS__MONGO_URL": f"mongodb://127.0.0.1:{free_port()}"}
    with own_kafka(tmp_path / "kafka") as kafka:
        await prepare(kafka.bootstrap)
        await routes.publish(kafka.bootstrap, [first])
        with gateways(kafka.bootstrap, folder, KAFKA__FETCH_WAIT_MS=500, **nowhere) as [gateway]:
            async with asking(gateway.url) as load:
                await until(lambda: load.pids[first.pid] > 20)
                await asyncio.to_thread(kafka.kill)
                await health(gateway, "degraded")
                await until(more(lambda: load.pids[first.pid], 100))
                await asyncio.to_thread(kafka.start_again)
                await health(gateway, "ok")
                await routes.publish(kafka.bootstrap, [second])
                await until(more(lambda: load.pids[second.pid], 50))
    assert set(load.statuses) == {200}
    assert set(load.pids) == {first.pid, second.pid}
