"""When a consumer's process has to be started again, and when that would not help; with short times, over a real broker."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from consumers.app import stop_broker
from events.base import Envelope
from events.datasets import DatasetUploaded
from events.topics import Topic
from mini_studio.bus import liveness
from mini_studio.bus.consumer import Consumer, start_broker
from mini_studio.bus.kafka import Publisher, create_topics
from mini_studio.bus.liveness import Liveness
from mini_studio.bus.relay import outgoing
from mini_studio.settings import Kafka
from tests.fakes.broker import running_broker
from tests.fakes.fault_proxy import FaultProxy
from tests.fakes.log import write
from tests.fakes.waiting import until


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"EVERY_S": 0.2, "ANSWER_S": 1.0, "STILL_AFTER_S": 1.0, "LOST_AFTER_S": 0.0}.items():
        monkeypatch.setattr(liveness, name, seconds)


SAMPLE = Path(__file__).parents[1] / "events" / "samples" / "dataset.uploaded.v1.json"


def sample() -> dict[str, Any]:
    """The one event of these tests, as the journal has it."""
    stored = json.loads(SAMPLE.read_text())
    return {**stored, "topic": Topic.DATASETS.value, "value": json.dumps(stored["value"])}


class Journal:
    """A record store as far as the delivery asks it."""

    async def journalled(self, event_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        return {id: sample() for id in event_ids}


class Run:
    """A consumer of datasets under a group of its own, and what is said of it."""

    def __init__(self, settings: Kafka) -> None:
        self.settings = settings
        self.consumer = Consumer("datasets", group=f"test.{uuid.uuid4()}")
        self.given = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

        @self.consumer.on(DatasetUploaded)
        async def wait(envelope: Envelope[DatasetUploaded], studio: Any) -> None:
            self.given += 1
            await self.go_on.wait()

    async def publish(self) -> None:
        sent = outgoing(sample())
        await write(self.settings.bootstrap, Topic.DATASETS, [(sent.value, list(sent.headers))], key=sent.key or b"")

    def client(self) -> Any:
        (subscriber,) = self.broker.subscribers
        return subscriber.consumer

    async def stays_well(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.liveness.lost() is None, self.liveness.problem()
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(run: Run) -> AsyncIterator[Run]:
    async with Publisher(run.settings) as publisher:
        run.broker = run.consumer.broker(run.settings, publisher, SimpleNamespace(store=Journal()))
        run.liveness = Liveness(run.consumer, run.broker, run.settings)
        await start_broker(run.broker, run.settings)
        looking = asyncio.create_task(run.liveness.run())
        await run.stays_well(1)
        assert run.liveness.problem() is None
        yield run
        looking.cancel()
        run.go_on.set()
        await stop_broker(run.broker)


@pytest.fixture
async def settings(bootstrap: str) -> Kafka:
    settings = Kafka(bootstrap=bootstrap, partitions=1, fetch_wait_ms=50, session_timeout_ms=2000)
    await create_topics(settings)
    return settings


async def pause(run: Run) -> None:
    run.client().pause(*run.client().assignment())
    await run.publish()


async def end_its_task(run: Run) -> None:
    (subscriber,) = run.broker.subscribers
    for task in subscriber.tasks:
        task.cancel()


async def leave_the_group(run: Run) -> None:
    run.client().unsubscribe()


async def hang_in_a_handler(run: Run) -> None:
    run.consumer.longest_s = 1.0
    run.go_on.clear()
    await run.publish()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (pause, "is behind and handles nothing"),
        (end_its_task, "takes no records any more"),
        (leave_the_group, "has none of 1 partitions in a group of "),
        (hang_in_a_handler, "is in one batch"),
    ],
)
async def test_a_consumer_that_does_nothing_is_lost(
    settings: Kafka, break_it: Callable[[Run], Any], reason: str
) -> None:
    async with running(Run(settings)) as run:
        await break_it(run)
        await until(run.liveness.lost)
        assert reason in str(run.liveness.lost())


async def test_a_long_handler_and_a_member_to_spare_are_well(settings: Kafka) -> None:
    first, second = Run(settings), Run(settings)
    second.consumer.group = first.consumer.group
    async with running(first), running(second):
        await until(lambda: not (first.client().assignment() and second.client().assignment()))
        for run in (first, second):
            run.go_on.clear()
        await first.publish()
        await until(lambda: first.consumer.busy or second.consumer.busy)
        await first.stays_well(5)
        await second.stays_well(0.1)


@pytest.mark.real
async def test_a_batch_in_hand_is_finished_before_its_partition_is_given_up(real_bootstrap: str) -> None:
    patient = Kafka(bootstrap=real_bootstrap)
    await create_topics(patient)
    first, second = Run(patient), Run(patient)
    second.consumer.group = first.consumer.group
    async with running(first):
        first.go_on.clear()
        before = first.given
        await first.publish()
        await until(lambda: first.given > before)

        async def finish_in_the_rebalance() -> None:
            await until(lambda: first.client()._subscription.reassignment_in_progress)
            await asyncio.sleep(3)
            first.go_on.set()

        finishing = asyncio.create_task(finish_in_the_rebalance())
        async with running(second):
            await finishing
            await asyncio.sleep(2)
    assert first.given + second.given == before + 1


async def test_a_lost_coordinator_asks_for_a_new_process_and_a_broker_that_is_away_does_not() -> None:
    async with FaultProxy() as proxy:
        with running_broker(advertised=proxy.port) as address:
            proxy.target = int(address.rpartition(":")[2])
            settings = Kafka(
                bootstrap=f"127.0.0.1:{proxy.port}", partitions=1, fetch_wait_ms=50, session_timeout_ms=2000
            )
            await create_topics(settings)
            async with running(Run(settings)) as run:
                proxy.freeze(new=True)
                await until(lambda: "the broker is away" in str(run.liveness.problem()))
                await run.stays_well(5)
                proxy.thaw()
                await until(lambda: run.liveness.problem() is None)
                proxy.freeze(new=False)
                await until(run.liveness.lost)
                assert "does not reach its coordinator" in str(run.liveness.lost())
                proxy.thaw()
