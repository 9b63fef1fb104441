"""Outbox to consumer over a real broker: relay, journal, delivery, dead letters, redelivery."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiokafka import ConsumerRecord
from faststream.exceptions import NackMessage
from structlog.contextvars import get_contextvars

from consumers import jobs
from events.base import Cause, Envelope
from events.fine_tuning import FineTuneRequested, FineTuneStarted
from events.topics import Topic, dead_letter_topic
from mini_studio.bus.consumer import Consumer, start_broker
from mini_studio.bus.delivery import MAX_SURPRISES, Delivery, text_headers
from mini_studio.bus.kafka import Outgoing, Publisher, create_topics
from mini_studio.bus.relay import BATCH, Relay, outgoing
from mini_studio.errors import Unavailable
from mini_studio.records.jobs import Job
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import Studio, open_studio
from tests.consumers.cases import a_requested_job
from tests.fakes.log import read_all, write, write_nulls
from tests.fakes.waiting import until

CAUSE = Cause(correlation_id="test")


@asynccontextmanager
async def running(consumer: Consumer, studio: Studio) -> AsyncIterator[None]:
    broker = consumer.broker(studio.settings.kafka, studio.publisher, studio)
    await start_broker(broker, studio.settings.kafka)
    yield
    await asyncio.wait_for(broker.stop(), 20)


def collector(handle: Callable[[Envelope[Any]], Any] = lambda envelope: None) -> tuple[Consumer, list[Envelope[Any]]]:
    """A consumer of fine-tunes under a fresh group that keeps what it gets."""
    consumer, seen = Consumer("jobs", group=f"test.{uuid.uuid4()}"), []

    @consumer.on(FineTuneRequested, FineTuneStarted)
    async def keep(envelope: Envelope[Any], studio: Studio) -> None:
        handle(envelope)
        seen.append(envelope)

    return consumer, seen


async def test_a_written_record_reaches_the_journal_and_every_consumer(studio: Studio) -> None:
    consumer, seen = collector()
    job = a_requested_job()
    async with running(consumer, studio):
        await studio.jobs.insert(job)
        await until(lambda: job.id in [e.subject for e in seen])
    (got,) = [e for e in seen if e.subject == job.id]
    assert (got.sequence, got.client_code, got.data.base_model) == (1, "acme", "tiny-llama")
    assert [entry.event_id for entry in await studio.store.read_journal(key=job.id)] == [got.id]
    deadline = time.monotonic() + 10
    while await studio.store.pending([Job.COLLECTION], 10):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


class SlowBroker(Publisher):
    """Acknowledges only so many records within the publish timeout."""

    async def publish(self, records: Sequence[Outgoing]) -> None:
        if len(records) > BATCH:
            raise Unavailable("timed out")
        await super().publish(records)


async def test_a_long_outbox_leaves_in_order_a_part_at_a_time(bootstrap: str, tmp_path: Path) -> None:
    many = BATCH * 2 + 5
    run, short = a_requested_job(), a_requested_job()
    (entry,) = run.outbox
    entries = [{**entry, "headers": {**entry["headers"], "ce_id": f"{run.id}-{n}"}} for n in range(many)]
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=bootstrap, partitions=1))
    await create_topics(settings.kafka)
    async with open_studio(settings) as studio, SlowBroker(settings.kafka) as publisher:
        await studio.jobs.insert(run.model_copy(update={"outbox": tuple(entries)}))
        await studio.jobs.insert(short)
        relay = Relay(studio.store, publisher, [Job.COLLECTION])
        assert [await relay.sweep() for _ in range(4)] == [BATCH + 1, BATCH, 5, 0]
    log = await read_all(bootstrap, Topic.FINE_TUNES)
    sent = [dict(r.headers)["ce_id"].decode() for r in log if r.key == run.id.encode()]
    assert sent == [f"{run.id}-{n}" for n in range(many)]


class CreepingBroker(Publisher):
    """Acknowledges five records within the publish timeout."""

    async def publish(self, records: Sequence[Outgoing]) -> None:
        if len(records) > 5:
            raise Unavailable("timed out")
        await super().publish(records)


async def test_the_slowest_broker_makes_progress(bootstrap: str, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=bootstrap, partitions=1))
    await create_topics(settings.kafka)
    async with open_studio(settings) as studio, CreepingBroker(settings.kafka) as publisher:
        await studio.store.put_all(Job.COLLECTION, [(a_requested_job().document(), None) for _ in range(40)])
        relay = Relay(studio.store, publisher, [Job.COLLECTION])
        for _ in range(40):
            with contextlib.suppress(Unavailable):
                await relay.sweep()
        assert not await studio.store.pending([Job.COLLECTION], 1)


class WatchedBroker(Publisher):
    """Goes away at one call of `publish`, and notes whether everything it was given stood in the journal."""

    def __init__(self, studio: Studio, fails_at: int) -> None:
        super().__init__(studio.settings.kafka)
        self.store, self.fails_at, self.calls = studio.store, fails_at, 0

    async def publish(self, records: Sequence[Outgoing]) -> None:
        ids = [dict(record.headers)["ce_id"].decode() for record in records]
        assert set(await self.store.journalled(ids)) == set(ids), "journal first"
        self.calls += 1
        if self.calls == self.fails_at:
            raise Unavailable("timed out")
        await super().publish(records)


async def test_what_was_acknowledged_is_settled_though_a_later_batch_fails(bootstrap: str, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=bootstrap, partitions=1))
    await create_topics(settings.kafka)
    jobs_ = [a_requested_job() for _ in range(BATCH * 2 + 5)]
    async with open_studio(settings) as studio, WatchedBroker(studio, fails_at=2) as publisher:
        await studio.store.put_all(Job.COLLECTION, [(job.document(), None) for job in jobs_])
        relay = Relay(studio.store, publisher, [Job.COLLECTION])
        with pytest.raises(Unavailable):
            await relay.sweep()
        assert len(await studio.store.pending([Job.COLLECTION], 2000)) == BATCH + 5
        while await relay.sweep():
            pass
    keys = [record.key.decode() for record in await read_all(bootstrap, Topic.FINE_TUNES)]
    assert all(keys.count(job.id) == 1 for job in jobs_)


async def test_an_outage_is_waited_out_in_order(studio: Studio) -> None:
    failures = 3
    tries: list[str] = []

    def fail_first(envelope: Envelope[Any]) -> None:
        tries.append(envelope.subject)
        if len(tries) <= failures:
            raise Unavailable("away")

    first, second = a_requested_job(), a_requested_job()
    consumer, seen = collector(lambda e: fail_first(e) if e.subject in (first.id, second.id) else None)
    await studio.jobs.insert(first)
    await studio.jobs.insert(second)
    async with running(consumer, studio):
        await until(lambda: second.id in [e.subject for e in seen])
    handled = [e.subject for e in seen if e.subject in (first.id, second.id)]
    assert sorted(handled) == sorted([first.id, second.id]), "each once"
    assert tries[: failures + 1] == [tries[0]] * (failures + 1), "the partition waits for its first record"


async def test_a_batch_waits_as_a_whole_while_the_records_are_away(studio: Studio) -> None:
    asked: list[float] = []
    real = studio.store.journalled

    async def journalled(event_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        asked.append(time.monotonic())
        if len(asked) <= 3:
            raise Unavailable("the record store is locked")
        return await real(event_ids)

    studio.store.journalled = journalled  # type: ignore[method-assign]
    many = [a_requested_job() for _ in range(20)]
    entries = [entry for job in many for entry in job.outbox]
    await studio.store.journal(entries)
    await studio.publisher.publish([outgoing(entry) for entry in entries])
    consumer = Consumer("jobs", group=f"test.{uuid.uuid4()}")
    consumer.projects(FineTuneRequested)(jobs.project)
    async with running(consumer, studio):
        while not all([await studio.jobs.get("acme", job.id) for job in many]):
            await asyncio.sleep(0.05)
    assert all(later - earlier >= 1 for earlier, later in pairwise(asked[:4])), "not once for each record"
    assert not await read_all(studio.settings.kafka.bootstrap, dead_letter_topic(Topic.FINE_TUNES, "jobs"))


async def test_poison_is_dead_lettered_as_it_is_and_the_good_goes_on(studio: Studio) -> None:
    poison: list[tuple[bytes | None, list[tuple[str, Any]]]] = [
        (b"\xff\xfe not json", [("ce_specversion", b"1.0"), ("ce_type", b"fine_tune.requested.v1")]),
        (b"{}", [("ce_specversion", b"1.0"), ("ce_type", b"nobody.knows.v9")]),
        (b"{}", [("binary", b"\xff\xfe"), ("null", None)]),
        (None, []),
    ]
    mark = uuid.uuid4().hex.encode()
    bootstrap = studio.settings.kafka.bootstrap
    await write(bootstrap, Topic.FINE_TUNES, poison, key=mark)
    consumer, seen = collector()
    job = a_requested_job()
    await studio.jobs.insert(job)
    async with running(consumer, studio):
        await until(lambda: job.id in [e.subject for e in seen])
    dead = [r for r in await read_all(bootstrap, dead_letter_topic(Topic.FINE_TUNES, "jobs")) if r.key == mark]
    assert [r.value for r in dead] == [value for value, _ in poison]
    for record, (_, headers) in zip(dead, poison, strict=True):
        added = dict(record.headers)
        assert list(record.headers)[: len(headers)] == headers
        assert added["dlq_topic"] == Topic.FINE_TUNES.encode()
        assert added["dlq_reason"]


async def test_poison_in_a_batch_that_has_to_wait_is_dead_lettered_once(studio: Studio) -> None:
    bootstrap, mark, tries = studio.settings.kafka.bootstrap, uuid.uuid4().hex.encode(), []
    job = a_requested_job()

    def fail_first(envelope: Envelope[Any]) -> None:
        tries.append(envelope.subject)
        if len(tries) <= 2:
            raise Unavailable("away")

    consumer, seen = collector(lambda e: fail_first(e) if e.subject == job.id else None)
    await write(bootstrap, Topic.FINE_TUNES, [(b"poison", [])], key=mark)
    await studio.store.journal(job.outbox)
    await studio.publisher.publish([outgoing(entry) for entry in job.outbox])
    async with running(consumer, studio):
        await until(lambda: job.id in [e.subject for e in seen])
    dead = await read_all(bootstrap, dead_letter_topic(Topic.FINE_TUNES, "jobs"))
    assert [r.value for r in dead if r.key == mark] == [b"poison"]


async def test_a_record_of_nulls_is_dead_lettered_and_the_good_goes_on(studio: Studio) -> None:
    bootstrap, mark = studio.settings.kafka.bootstrap, uuid.uuid4().hex.encode()
    await write_nulls(bootstrap, Topic.FINE_TUNES, [("mark", mark)])
    consumer, seen = collector()
    job = a_requested_job()
    await studio.jobs.insert(job)
    async with running(consumer, studio):
        await until(lambda: job.id in [e.subject for e in seen])
    dead = await read_all(bootstrap, dead_letter_topic(Topic.FINE_TUNES, "jobs"))
    assert [(r.key, r.value) for r in dead if ("mark", mark) in r.headers] == [(None, None)]


async def test_what_cannot_be_dead_lettered_is_put_off(studio: Studio) -> None:
    delivery = Delivery("jobs", studio.publisher)
    with pytest.raises(NackMessage):
        await delivery.bury(replace(a_record(7), value="no bytes"), "poison")
    assert not delivery.buried


async def test_the_longest_outage_still_has_a_backoff(studio: Studio) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Delivery("jobs", studio.publisher).put_off(5000, "away"), 0.1)


async def test_an_outage_does_not_use_up_the_surprises(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_studio.bus.delivery.BACKOFF_MAX_S", 0.0)
    delivery, record = Delivery("jobs", studio.publisher), a_record(9)

    async def fails_with(error: Exception) -> None:
        async def handle(record: Any, headers: dict[str, str]) -> None:
            raise error

        with pytest.raises(NackMessage):
            await delivery.deliver(record, text_headers(record), handle)

    for _ in range(MAX_SURPRISES + 1):
        await fails_with(Unavailable("away"))
    for _ in range(MAX_SURPRISES - 1):
        await fails_with(RuntimeError("nobody expected it"))
    assert not delivery.buried


async def test_failures_are_counted_per_record_and_forgotten_with_their_batch(studio: Studio) -> None:
    delivery = Delivery("jobs", studio.publisher)
    one, two = (a_record(offset) for offset in (7, 8))
    counts = [delivery.count_failure(record) for record in (one, two, one, two, one)]
    assert counts == [1, 1, 2, 2, 3]
    await delivery.bury(one, "poison")
    delivery.forget([one, two])
    assert not delivery.failures
    assert not delivery.buried


async def test_log_lines_name_the_record_they_are_about_and_no_other(studio: Studio) -> None:
    bound: list[dict[str, Any]] = []
    consumer, seen = collector(lambda envelope: bound.append(get_contextvars()))
    decided = [entry for _ in range(2) for entry in a_requested_job().outbox]
    await studio.store.journal(decided)
    requests = [outgoing(entry) for entry in decided]
    records = tuple(replace(a_record(n), key=r.key, value=r.value, headers=r.headers) for n, r in enumerate(requests))
    message: Any = SimpleNamespace(raw_message=records)
    before = get_contextvars()
    await consumer._handler(Delivery("jobs", studio.publisher), studio)(message)
    assert [(b["event_id"], b["subject"], b["consumer"]) for b in bound] == [(e.id, e.subject, "jobs") for e in seen]
    assert len(seen) == 2
    assert get_contextvars() == before


class Silent:
    """In the place of a Kafka consumer: it has news after it was waited for in vain."""

    def __init__(self, record: ConsumerRecord[Any, Any]) -> None:
        self.answers: list[dict[str, list[Any]]] = [{}, {}, {"partition": [record]}]

    async def getmany(self, **options: object) -> dict[str, list[Any]]:
        return self.answers.pop(0)


async def test_a_consumer_that_waited_in_vain_goes_on_waiting_and_never_looks_away(studio: Studio) -> None:
    consumer, _ = collector()
    [subscriber] = consumer.broker(studio.settings.kafka, studio.publisher, studio).subscribers
    record = a_record(1)
    assert await cast("Any", subscriber).get_msg(Silent(record)) == (record,)


def a_record(offset: int) -> ConsumerRecord[Any, Any]:
    return ConsumerRecord(Topic.FINE_TUNES.value, 0, offset, 0, 0, b"key", b"value", None, 3, 5, ())


async def test_job_records_follow_the_log_once(studio: Studio) -> None:
    job = a_requested_job()
    async with running(jobs.consumer, studio):
        await studio.jobs.insert(job)
        started = FineTuneStarted(job_id=job.id, attempt=1, submission_id="x")
        envelope = Envelope.of(started, subject=job.id, sequence=1, client_code="acme", cause=CAUSE)
        entry = envelope.stored()
        await studio.store.journal([entry])
        for _ in range(3):
            await studio.publisher.publish([outgoing(entry)])
        deadline = time.monotonic() + 30
        while (found := await studio.jobs.get("acme", job.id)) is None or found.status != "running":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    assert found.applied == {"api": 1, "training": 1}
    assert found.attempt == 1
