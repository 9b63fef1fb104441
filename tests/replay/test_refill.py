"""A broker that lost its topics is refilled from the journal: nothing changed, nothing twice, whatever interrupts it."""

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient

from events.base import Envelope
from events.fine_tuning import FineTuneProgressed
from events.topics import ROUTES, Topic
from events.types import new_id
from mini_studio.bus.kafka import Outgoing, Publisher, all_topics
from mini_studio.bus.relay import BATCH, outgoing
from mini_studio.bus.replay import Refilled, refill
from mini_studio.errors import Unavailable
from mini_studio.records.deployments import Deployment
from mini_studio.records.projection import requested
from mini_studio.records.record import ANYONE
from mini_studio.records.routes import RouteRecord
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import Studio, open_studio
from tests.consumers.cases import CAUSE, deploy, envelope, fine_tune
from tests.fakes.broker import running_broker
from tests.faults.length import length

DEPLOYMENTS = 3


@pytest.fixture
def empty_broker() -> Iterator[str]:
    with running_broker() as bootstrap:
        yield bootstrap


def settings_at(bootstrap: str, data: Path) -> Settings:
    return Settings(data=data, kafka=Kafka(bootstrap=bootstrap, partitions=2, fetch_wait_ms=20))


async def fill(studio: Studio, events: int) -> None:
    """Journal the interleaved events of many jobs, and of a few deployments with their routes."""
    ids = [new_id("job") for _ in range(events // 10)]
    told: list[Envelope[Any]] = [envelope(fine_tune(id), id) for id in ids]
    for n in range(1, 10):
        told += [envelope(FineTuneProgressed(job_id=id, attempt=1, step=n), id, n) for id in ids]
    for _ in range(DEPLOYMENTS):
        id = new_id("dep")
        deployment = requested(Deployment, deploy(id), subject=id, client_code="acme", cause=CAUSE)
        told.append(envelope(deploy(id), id))
        await studio.routes.insert(RouteRecord.of(deployment).model_copy(update={"outbox": ()}))
    await studio.store.journal([each.stored() for each in told])


async def log_of(bootstrap: str, topic: str) -> dict[int, list[Outgoing]]:
    """A topic's records by partition, as any client reads them."""
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
    )
    await consumer.start()
    found: dict[int, list[Outgoing]] = {partition.partition: [] for partition in consumer.assignment()}
    quiet = 0
    while quiet < 3:
        batches = await consumer.getmany(timeout_ms=700)
        quiet = 0 if batches else quiet + 1
        for partition, records in batches.items():
            found[partition.partition] += [Outgoing(topic, r.key, r.value, list(r.headers)) for r in records]
    await consumer.stop()
    return found


async def is_the_journal(studio: Studio) -> None:
    """Each topic holds the journal's events: each once, bytes and headers unchanged, in journal order within a partition."""
    entries = [outgoing(entry.stored) for entry in await studio.store.read_journal(limit=10_000_000)]
    bootstrap = studio.settings.kafka.bootstrap
    for topic in Topic:
        expected = [entry for entry in entries if entry.topic == topic]
        logged = await log_of(bootstrap, topic)
        keys = {record.key: number for number, records in logged.items() for record in records}
        assert {entry.key for entry in expected} == keys.keys()
        for number, records in logged.items():
            assert records == [entry for entry in expected if keys[entry.key] == number]
    routes = [record for records in (await log_of(bootstrap, ROUTES)).values() for record in records]
    assert Counter(ce_id(record) for record in routes) == Counter(
        f"{route.id}/{route.revision}".encode() for route in await studio.routes.where(ANYONE)
    )


def ce_id(record: Outgoing) -> bytes:
    return dict(record.headers)["ce_id"]


class Narrow(Publisher):
    """Acknowledges only what is small enough, and goes away in the middle of the batch after the `allowed` ones."""

    def __init__(self, settings: Kafka, allowed: int = 1_000_000) -> None:
        super().__init__(settings)
        self.allowed = allowed

    async def publish(self, records: Sequence[Outgoing]) -> None:
        assert len(records) <= BATCH
        self.allowed -= 1
        if self.allowed < 0:
            await super().publish(records[: len(records) // 2])
            raise Unavailable("killed")
        await super().publish(records)


async def test_an_empty_broker_gets_the_journal_once(empty_broker: str, tmp_path: Path) -> None:
    settings = settings_at(empty_broker, tmp_path)
    async with open_studio(settings) as studio, Narrow(settings.kafka) as publisher:
        await fill(studio, 3000)
        events = 3000 + DEPLOYMENTS
        said: list[tuple[int, int]] = []
        told = lambda done: said.append((done.published, done.held))  # noqa: E731
        assert await refill(settings.kafka, studio.store, publisher, told) == Refilled(events + DEPLOYMENTS, 0)
        assert len(said) >= 3 and said == sorted(said)
        await is_the_journal(studio)
        assert await refill(settings.kafka, studio.store, publisher, told) == Refilled(0, events + DEPLOYMENTS)
        await is_the_journal(studio)


async def test_what_was_interrupted_anywhere_goes_on(empty_broker: str, tmp_path: Path) -> None:
    settings = settings_at(empty_broker, tmp_path)
    async with open_studio(settings) as studio:
        await fill(studio, 6000)
        for allowed in (0, 3, 1, 4):
            async with Narrow(settings.kafka, allowed) as publisher:
                with pytest.raises(Unavailable):
                    await refill(settings.kafka, studio.store, publisher, lambda done: None)
        async with Narrow(settings.kafka) as publisher:
            done = await refill(settings.kafka, studio.store, publisher, lambda done: None)
        assert done.held >= 4 * (BATCH // 2) and done.published > 0
        await is_the_journal(studio)


async def test_what_was_decided_after_it_began_is_left_to_the_relays(empty_broker: str, tmp_path: Path) -> None:
    settings = settings_at(empty_broker, tmp_path)
    async with open_studio(settings) as studio:
        await fill(studio, 100)

        real = studio.publisher.publish

        async def publish(records: Sequence[Outgoing]) -> None:
            studio.publisher.publish = real  # type: ignore[method-assign]
            await fill(studio, 10)
            await real(records)

        studio.publisher.publish = publish  # type: ignore[method-assign]
        done = await refill(settings.kafka, studio.store, studio.publisher, lambda done: None)
        assert done.published == 100 + DEPLOYMENTS + 2 * DEPLOYMENTS, "the events before, and the routes as they are"


@pytest.mark.real
@pytest.mark.timeout(600)
async def test_a_real_cluster_that_lost_its_topics_is_refilled_though_killed(
    real_bootstrap: str, tmp_path: Path
) -> None:
    events = int(length(short=20_000, full=200_000))
    settings = settings_at(real_bootstrap, tmp_path)
    await lose_topics(real_bootstrap, all_topics())
    async with open_studio(settings) as studio:
        await fill(studio, events)
        for lines in (1, 3):
            await asyncio.to_thread(refill_and_kill, settings, lines)
        partly = sum(len(records) for records in (await log_of(real_bootstrap, Topic.FINE_TUNES)).values())
        assert 0 < partly < events
        code, said = await asyncio.to_thread(command, settings)
        assert code == 0, said
        await is_the_journal(studio)
        code, said = await asyncio.to_thread(command, settings)
        assert (code, "done: 0 published" in said) == (0, True), said
        code, said = await asyncio.to_thread(command, settings, "events", "tail", "--no-follow", "--json")
        assert (code, said.count('"ce_id"')) == (0, events + DEPLOYMENTS), "all partitions are read"
        await lose_topics(real_bootstrap, [Topic.DEPLOYMENTS, ROUTES])
        code, said = await asyncio.to_thread(command, settings)
        assert (code, f"done: {2 * DEPLOYMENTS} published" in said) == (0, True), said
        await is_the_journal(studio)


REFILL = ("journal", "refill")


def started(settings: Settings, *words: str) -> "subprocess.Popen[str]":
    kafka = settings.kafka
    environment = {
        **os.environ, "MINI_STUDIO_KAFKA__BOOTSTRAP": kafka.bootstrap, "PYTHONUNBUFFERED": "1",
        "MINI_STUDIO_KAFKA__PARTITIONS": str(kafka.partitions), "MINI_STUDIO_KAFKA__IDEMPOTENT": "true",
    }  # fmt: skip
    line = [sys.executable, "-m", "mini_studio.cli", *(words or REFILL), "--data", str(settings.data)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def command(settings: Settings, *words: str) -> tuple[int, str]:
    process = started(settings, *words)
    said, _ = process.communicate()
    return process.returncode, said


def refill_and_kill(settings: Settings, lines: int) -> None:
    """Kill it with -9 while it is publishing, after so many reports of progress."""
    process = started(settings)
    assert process.stdout is not None
    for _ in range(lines):
        assert "published" in process.stdout.readline()
    process.kill()
    assert process.wait() == -9


async def lose_topics(bootstrap: str, topics: Sequence[str]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    there = [topic for topic in topics if topic in await admin.list_topics()]
    if there:
        await admin.delete_topics(there)
    while set(there) & set(await admin.list_topics()):
        await asyncio.sleep(0.1)
    await admin.close()
