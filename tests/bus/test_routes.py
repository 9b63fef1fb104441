"""The gateways' routes over a real broker."""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from events.deployments import DeploymentReady
from events.topics import ROUTES
from mini_studio.bus.kafka import Outgoing, Publisher, create_topics
from mini_studio.bus.relay import Relay, outgoing
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.records.routes import RouteRecord
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import Studio, open_studio
from tests.fakes.broker import broker_process, running_broker
from tests.fakes.waiting import until
from tests.unit.test_records import deployment, follow, ready, removed, status


@contextlib.asynccontextmanager
async def following(
    settings: Kafka, epoch: Callable[[], int] = lambda: 0
) -> AsyncIterator[tuple[RouteTable, RouteFeed]]:
    table = RouteTable()
    feed = RouteFeed(settings, table, epoch)
    task = asyncio.create_task(feed.run())
    try:
        yield table, feed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_late_duplicates_of_routes_change_nothing() -> None:
    back = follow(
        removed(ready(deployment(), 1)), status(deployment(), DeploymentReady, 3, endpoints=["http://h:1"], replicas=1)
    )
    live, gone, again = [outgoing(entry) for entry in back.outbox[-3:]]
    with running_broker() as bootstrap:
        settings = Kafka(bootstrap=bootstrap, fetch_wait_ms=20)
        await create_topics(settings)
        async with Publisher(settings) as publisher, following(settings) as (table, _):
            nonsense = Outgoing(ROUTES, gone.key, None, [("ce_id", b"no revision")])
            await publisher.publish([gone, live, nonsense])
            await asyncio.sleep(1)
            assert table.all() == []
            await publisher.publish([again, gone])
            await asyncio.sleep(1)
            assert [route.revision for route in table.all()] == [back.revision]


async def test_the_standalone_relay_leaves_fresh_routes_to_their_process(bootstrap: str, tmp_path: Path) -> None:
    async with open_studio(Settings(data=tmp_path, kafka=Kafka(bootstrap=bootstrap))) as studio:
        await create_topics(studio.settings.kafka)
        await studio.routes.insert(ready(deployment(), 1))
        sweeper = Relay(studio.store, studio.publisher, [RouteRecord.COLLECTION], min_age_s=0.5)
        assert await sweeper.sweep() == 0
        await asyncio.sleep(0.5)
        assert await sweeper.sweep() == 2


async def test_the_table_counts_as_loaded_when_the_log_has_been_read_and_not_before() -> None:
    wait_s = 2.0  # the embedded broker holds a fetch from an empty topic for this long
    with running_broker() as bootstrap:
        settings = Kafka(bootstrap=bootstrap, fetch_wait_ms=int(wait_s * 1000))
        await create_topics(settings)
        async with following(settings) as (table, _):
            await asyncio.sleep(wait_s - 0.5)
            assert not table.loaded, "no fetch has been answered yet"
            await until(lambda: table.loaded, 5)


async def test_a_loaded_table_has_every_route(bootstrap: str) -> None:
    settings = Kafka(bootstrap=bootstrap)
    await create_topics(settings)
    record = ready(deployment("someone"), 1)
    async with Publisher(settings) as publisher:
        await publisher.publish([outgoing(entry) for entry in record.outbox])
    async with following(settings) as (table, _):
        await until(lambda: table.loaded, 5)
        assert record.route in table.all()


async def test_the_feed_outlives_what_nobody_expected(bootstrap: str) -> None:
    settings = Kafka(bootstrap=bootstrap, fetch_wait_ms=20)
    await create_topics(settings)
    surprises = [RuntimeError("a bug")]

    def epoch() -> int:
        if surprises:
            raise surprises[0]
        return 0

    async with following(settings, epoch) as (table, feed):
        await until(lambda: "a bug" in (feed.problem or ""), 5)
        surprises.clear()
        await until(lambda: table.loaded and feed.problem is None, 10)


async def test_the_feed_notices_a_broker_that_only_keeps_silent_and_comes_back() -> None:
    with broker_process() as (bootstrap, broker):
        settings = Kafka(bootstrap=bootstrap)
        await create_topics(settings)
        record = ready(deployment("someone"), 1)
        async with following(settings) as (table, feed), Publisher(settings) as publisher:
            await until(lambda: table.loaded and feed.problem is None, 10)
            broker.send_signal(signal.SIGSTOP)
            paused = time.monotonic()
            await until(lambda: "has not answered for" in (feed.problem or ""), 5)
            assert time.monotonic() - paused < 3
            await asyncio.sleep(8)  # longer than it takes until the client is replaced
            assert feed.problem
            broker.send_signal(signal.SIGCONT)
            await publisher.publish([outgoing(entry) for entry in record.outbox])
            await until(lambda: record.route in table.all() and feed.problem is None, 15)


async def test_the_feed_outlives_a_broker_that_is_killed() -> None:
    record = ready(deployment("someone"), 1)
    with broker_process() as (bootstrap, broker):
        settings = Kafka(bootstrap=bootstrap)
        await create_topics(settings)
        async with following(settings) as (table, feed):
            await until(lambda: table.loaded and feed.problem is None, 10)
            broker.kill()
            await until(lambda: "Unable to bootstrap" in (feed.problem or ""), 15)
            with broker_process(int(bootstrap.rpartition(":")[2])):
                await create_topics(settings)
                async with Publisher(settings) as publisher:
                    await publisher.publish([outgoing(entry) for entry in record.outbox])
                    await until(lambda: record.route in table.all() and feed.problem is None, 15)


async def test_the_relay_outlives_what_nobody_expected(studio: Studio) -> None:
    broken = {"_id": "broken", "version": 1, "client_code": "acme", "outbox": [{"topic": ROUTES}]}
    await studio.store.insert(RouteRecord.COLLECTION, broken)
    studio.relay.wake()
    await until(lambda: "KeyError" in (studio.relay.problem or ""), 5)
    await studio.store.replace(RouteRecord.COLLECTION, {**broken, "version": 2, "outbox": []}, 1)
    await studio.routes.insert(ready(deployment(), 1))
    await until(lambda: studio.relay.problem is None, 10)
    assert not await studio.store.pending([RouteRecord.COLLECTION], 10)
