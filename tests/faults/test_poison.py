"""Whatever is put on the log: each consumer puts aside what it can never handle, as it is, and goes on; redriven, all of it is restored."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import time
from typing import Any, ClassVar

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from faststream.kafka import KafkaBroker

from consumers.app import CONSUMERS as ALL_CONSUMERS
from consumers.app import stop_broker
from events import registry
from events.base import Envelope, Event, Source
from events.datasets import DatasetProfiled
from events.deployments import DeploymentApplied
from events.fine_tuning import FineTuneProgressed, FineTuneQueued, FineTuneStarted
from events.topics import Topic, dead_letter_topic
from events.types import new_id
from mini_studio.bus.consumer import Consumer, start_broker
from mini_studio.bus.dead_letters import DeadLetters
from mini_studio.bus.kafka import READERS, create_topics
from mini_studio.bus.plain import PlainConsumer
from mini_studio.drivers.dfs import DfsStore
from mini_studio.errors import Invalid
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold
from mini_studio.records.record import ANYONE
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import DECIDED_BY, Studio, open_studio
from tests.consumers.cases import an_upload, deploy, envelope, eventually, fine_tune
from tests.fakes.log import read_all, write_nulls
from tests.faults.checker import content
from tests.faults.corpus import Raw, poison, raw
from tests.faults.logs import BROKERS, a_log

CONSUMERS = {name: consumer for name, consumer in ALL_CONSUMERS.items() if not isinstance(consumer, PlainConsumer)}
"""Those of events."""
PARTITIONS = 3
ASIDE_S, LAG_S = 5.0, 10.0
Place = tuple[str, int, int]


@pytest.fixture(params=BROKERS)
def bootstrap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with a_log(request.param, tmp_path) as address:
        yield address


@pytest.fixture
async def studio(bootstrap: str, tmp_path: Path) -> AsyncIterator[Studio]:
    kafka = Kafka(bootstrap=bootstrap, partitions=PARTITIONS, fetch_wait_ms=20)
    settings = Settings(data=tmp_path / "data", kafka=kafka)
    await create_topics(kafka)
    # Nobody relays what `training` and `serving` decide: the tests write that part of the histories themselves.
    async with open_studio(settings, relayed=DECIDED_BY["datasets"]) as studio:
        studio.s3 = DfsStore(tmp_path / "s3")  # type: ignore[assignment]
        yield studio


@contextlib.asynccontextmanager
async def running(studio: Studio) -> AsyncIterator[dict[str, KafkaBroker]]:
    """All consumers, without the watchers beside them."""
    brokers = {name: c.broker(studio.settings.kafka, studio.publisher, studio) for name, c in CONSUMERS.items()}
    await asyncio.gather(*(start_broker(broker, studio.settings.kafka) for broker in brokers.values()))
    try:
        yield brokers
    finally:
        await asyncio.gather(*(stop_broker(broker) for broker in brokers.values()))


async def caught_up(brokers: dict[str, KafkaBroker], ends: dict[TopicPartition, int]) -> bool:
    """Whether every consumer has committed all that was written."""
    for broker in brokers.values():
        for subscriber in broker.subscribers:
            consumer: Any = subscriber.consumer  # type: ignore[attr-defined]
            for partition, end in ends.items():
                if partition in consumer.assignment() and (await consumer.committed(partition) or 0) < end:
                    return False
    return True


async def a_topic(topic: Topic, studio: Studio) -> list[Envelope[Any]]:
    """The events of one real aggregate of a topic, its request first."""
    match topic:
        case Topic.FINE_TUNES:
            id = new_id("job")
            a = {"job_id": id, "attempt": 1}
            said: list[Event] = [FineTuneQueued(job_id=id, attempt=0), FineTuneStarted(**a, submission_id="s")]
            said += [FineTuneProgressed(**a, step=step) for step in (1, 2)]
            return [envelope(fine_tune(id), id), *(envelope(event, id, n) for n, event in enumerate(said, 1))]
        case Topic.DEPLOYMENTS:
            id = new_id("dep")
            applied = DeploymentApplied(deployment_id=id, generation=1, name=deploy(id).name)
            return [envelope(deploy(id), id), envelope(applied, id)]
        case Topic.DATASETS:
            return await an_upload(studio)


def an_orphan(topic: Topic) -> Envelope[Any]:
    """A status of an aggregate that nobody asked for."""
    match topic:
        case Topic.FINE_TUNES:
            id = new_id("job")
            return envelope(FineTuneStarted(job_id=id, attempt=1, submission_id="s"), id)
        case Topic.DEPLOYMENTS:
            id = new_id("dep")
            return envelope(DeploymentApplied(deployment_id=id, generation=1, name="n"), id)
        case Topic.DATASETS:
            id = new_id("ds")
            profile = {"state": "verified", "rows": 1, "characters": 1, "longest_line_bytes": 1, "tokens_estimated": 1}
            return envelope(DatasetProfiled(dataset_id=id, **profile), id)


@dataclass
class Written:
    """What was put on the log, where, and when."""

    poison: dict[Place, Raw] = field(default_factory=dict)
    orphans: set[Place] = field(default_factory=set)
    """Those of the poison that only a projection has to judge: others have no use for the type."""
    at: dict[Place, float] = field(default_factory=dict)
    good: dict[Topic, list[list[Envelope[Any]]]] = field(default_factory=dict)

    def of(self, consumer: str) -> dict[Place, Raw]:
        """The poison that a consumer has to put aside."""
        judges = consumer in ("jobs", "routes", "datasets")
        topics = READERS[consumer]
        return {p: r for p, r in self.poison.items() if p[0] in topics and (judges or p not in self.orphans)}


class Log:
    """Writes records as they are."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap
        self.producer = AIOKafkaProducer(bootstrap_servers=bootstrap, max_request_size=4 * 1024 * 1024)
        self.sent = 0
        self.ends: dict[TopicPartition, int] = {}

    async def __aenter__(self) -> "Log":
        await self.producer.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.producer.stop()

    async def put(self, topic: Topic, record: Raw) -> Place:
        """Good events where their key says, poison on every partition in turn."""
        self.sent += 1
        if record.key is None and record.value is None:
            offset = await write_nulls(self.bootstrap, topic, record.headers)
            self.ends[TopicPartition(topic.value, 0)] = offset + 1
            return topic.value, 0, offset
        partition = None if record.name == "good" else self.sent % PARTITIONS
        put = await self.producer.send_and_wait(
            topic, key=record.key, value=record.value, headers=record.headers, partition=partition
        )
        self.ends[TopicPartition(topic.value, put.partition)] = put.offset + 1
        return topic.value, put.partition, put.offset


async def write_everything(studio: Studio, log: Log) -> Written:
    """The corpus of each topic, with a real aggregate's events around each few of it."""
    written = Written()
    for topic, other in zip(Topic, [*Topic][1:] + [*Topic][:1], strict=True):
        first, elsewhere = await a_topic(topic, studio), (await a_topic(other, studio))[0]
        stranger = first[0].model_copy(update={"client_code": "mallory", "id": new_id("e"), "sequence": 2})
        orphan = an_orphan(topic)
        await studio.store.journal([e.stored() for e in (*first, elsewhere, stranger, orphan)])
        records = [*poison(first[0], elsewhere), raw(stranger, "of another client"), raw(orphan, "of no request")]
        written.good[topic] = [first]
        for event in first:
            await log.put(topic, raw(event))
        for number, record in enumerate(records):
            if number % 10 == 0:
                more = await a_topic(topic, studio)
                await studio.store.journal([e.stored() for e in more])
                written.good[topic].append(more)
                for event in more:
                    await log.put(topic, raw(event))
                # not a flood: what is timed is how long one record takes, not how many were in front of it
                await eventually(lambda topic=topic, more=more: handled(studio, {topic: [more]}), 90)  # type: ignore[misc]
            now = time()
            place = await log.put(topic, record)
            written.poison[place], written.at[place] = record, now
            if record.name == "of no request":
                written.orphans.add(place)
    return written


async def put_aside(bootstrap: str, consumer: str) -> dict[Place, Any]:
    """The records of a consumer's dead-letter topics that are dead letters, by where they came from."""
    found = {}
    for topic in READERS[consumer]:
        for record in await read_all(bootstrap, dead_letter_topic(topic, consumer)):
            added = dict(record.headers)
            if "dlq_offset" in added:
                place = added["dlq_topic"].decode(), int(added["dlq_partition"]), int(added["dlq_offset"])
                assert place not in found, f"{consumer} put {place} aside twice"
                found[place] = record
    return found


def check_aside(consumer: str, found: dict[Place, Any], wanted: dict[Place, Raw], at: dict[Place, float]) -> None:
    """Everything is there, byte for byte, in time, with a reason."""
    missing = [wanted[place].name for place in wanted.keys() - found.keys()]
    more = [found[place].headers for place in found.keys() - wanted.keys()]
    assert not missing and not more, (consumer, missing, more)
    for place, sent in wanted.items():
        record = found[place]
        added = dict(record.headers[-6:])
        assert (record.key, record.value, list(record.headers[:-6])) == (sent.key, sent.value, sent.headers), sent.name
        assert added["dlq_reason"], sent.name
        late = datetime.fromisoformat(added["dlq_time"].decode()).timestamp() - at[place]
        assert late <= ASIDE_S, f"{consumer} took {late:.1f} s for {sent.name!r}"


async def handled(studio: Studio, good: dict[Topic, list[list[Envelope[Any]]]]) -> bool:
    """Whether every consumer made of the good events what they say."""
    for events in good.get(Topic.FINE_TUNES, []):
        job, folded = await studio.jobs.get("acme", events[0].subject), fold(Job, events)
        if job is None or folded is None or await studio.runs.get("acme", job.id) is None:
            return False
        if content(job.document()) != content(folded.document()):
            return False
    for events in good.get(Topic.DEPLOYMENTS, []):
        deployment = await studio.deployments.get("acme", events[0].subject)
        release = await studio.releases.get("acme", events[0].subject)
        route = await studio.routes.get("acme", events[0].subject)
        if deployment is None or deployment.status != "deployed" or release is None or route is None:
            return False
    for events in good.get(Topic.DATASETS, []):
        dataset = await studio.datasets.get("acme", events[0].subject)
        if dataset is None or dataset.state != "verified":
            return False
    return True


@pytest.mark.timeout(300)
async def test_poison_is_put_aside_and_the_good_around_it_is_handled_in_order(studio: Studio) -> None:
    bootstrap = studio.settings.kafka.bootstrap
    asked: list[str] = []
    real = studio.store.read_journal

    async def read_journal(*, after: int = 0, limit: int = 1000, key: str | None = None) -> Any:
        asked.append(key or "")
        return await real(after=after, limit=limit, key=key)

    studio.store.read_journal = read_journal  # type: ignore[method-assign]
    async with running(studio) as brokers, Log(bootstrap) as log:
        written = await write_everything(studio, log)
        await eventually(lambda: handled(studio, written.good), 90)
        await eventually(lambda: caught_up(brokers, log.ends), LAG_S)
    assert min(len(written.of(name)) for name in CONSUMERS) >= 50
    for name in CONSUMERS:
        check_aside(name, await put_aside(bootstrap, name), written.of(name), written.at)
    subjects = {events[0].subject for aggregates in written.good.values() for events in aggregates}
    assert not subjects & set(asked), "nobody had to look in the journal for an event that came too late"


class FineTuneArchived(Event):
    """A type of tomorrow."""

    TOPIC: ClassVar = Topic.FINE_TUNES
    TYPE: ClassVar = "fine_tune.archived.v1"
    SOURCE: ClassVar = Source.API

    job_id: str


@dataclass
class Bug:
    """A handler that refuses what it should take, until it is mended."""

    subjects: set[str] = field(default_factory=set)

    def put_into(self, consumer: Consumer, patch: pytest.MonkeyPatch) -> None:
        deliver, projector = consumer.deliver, consumer._projector

        async def one(event: Envelope[Any], studio: Any) -> None:
            self.check(event)
            await deliver(event, studio)

        async def many(events: list[Envelope[Any]], studio: Any) -> None:
            for event in events:
                self.check(event)
            assert projector is not None
            await projector(events, studio)

        patch.setattr(consumer, "deliver", one)
        if projector is not None:
            patch.setattr(consumer, "_projector", many)

    def check(self, event: Envelope[Any]) -> None:
        if event.subject in self.subjects:
            raise Invalid("a bug")


@pytest.mark.timeout(300)
async def test_redrive_restores_everything_when_the_cause_is_gone(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap, bug, archived = studio.settings.kafka.bootstrap, Bug(), []
    for consumer in CONSUMERS.values():
        bug.put_into(consumer, monkeypatch)
    refused = {topic: [await a_topic(topic, studio) for _ in range(5)] for topic in Topic}
    lost = {topic: [await a_topic(topic, studio) for _ in range(5)] for topic in Topic}
    bug.subjects = {events[0].subject for aggregates in refused.values() for events in aggregates}
    await studio.store.journal([e.stored() for some in refused.values() for events in some for e in events])
    job = refused[Topic.FINE_TUNES][0][0].subject
    tomorrow = envelope(FineTuneArchived(job_id=job), job, 2)
    await studio.store.journal([tomorrow.stored()])
    hopeless = Raw("hopeless", b"key", b"never an event", [("a", None), ("b", b"\xff")])

    async def archive(event: Envelope[Any], studio: Studio) -> None:
        archived.append(event)

    async with running(studio) as brokers, Log(bootstrap) as log:
        for topic in Topic:
            for events in refused[topic] + lost[topic]:
                for event in events:
                    await log.put(topic, raw(event))
            await log.put(topic, hopeless)
        await log.put(Topic.FINE_TUNES, raw(tomorrow))
        counts = {"datasets": 11, "training": 12, "serving": 11, "jobs": 52, "routes": 21}
        letters = studio.dead_letters
        for name, count in counts.items():
            await eventually(lambda name=name, count=count: has_open(letters, name, count), 90)  # type: ignore[misc]
        # the causes go: the handlers are mended, the journal is restored, the new version is deployed
        bug.subjects.clear()
        await studio.store.journal([e.stored() for some in lost.values() for events in some for e in events])
        monkeypatch.setitem(registry.BY_TYPE, FineTuneArchived.TYPE, FineTuneArchived)
        monkeypatch.setitem(CONSUMERS["training"].handlers, FineTuneArchived, archive)
        projected = CONSUMERS["jobs"].handlers
        monkeypatch.setitem(projected, FineTuneArchived, projected[FineTuneQueued])
        refused[Topic.FINE_TUNES][0].append(tomorrow)
        assert {name: await letters.redrive_all(name) for name in counts} == counts
        await eventually(lambda: handled(studio, {topic: refused[topic] + lost[topic] for topic in Topic}), 90)
        for name in counts:
            await eventually(lambda name=name: has_open(letters, name, 1), 90)  # type: ignore[misc]
        await eventually(lambda: caught_up(brokers, log.ends))
    assert archived == [tomorrow], "each consumer took its own redrive alone"
    for name, count in counts.items():
        everything = await letters.page(consumer=name, limit=1000)
        (back,) = [letter for letter in everything if not letter.redriven]
        again = await letters.get(back.id)
        assert (again.key, again.value, list(again.headers)) == (hopeless.key, hopeless.value, hopeless.headers)
        assert len(everything) == count + 1, "nothing but the hopeless one came back"
    run = await studio.runs.get(ANYONE, job)
    assert run is not None and run.sequence == 1, "a redriven request is claimed once"


async def has_open(letters: DeadLetters, consumer: str, count: int) -> bool:
    return len(await letters.page(consumer=consumer, state="open", limit=1000)) == count
