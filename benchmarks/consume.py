"""What delivery costs, and how fast records follow the log: `python -m benchmarks.consume [--bootstrap HOST:PORT]`.

Without `--bootstrap` it starts the embedded broker. The log is filled once, with JOBS finished fine-tunes (ten events each) and
as many deployments (three events each) one after another, and journalled; every reader below is a new group that reads it
from its beginning, and counts from its first event to its last. It prints, in events a second, each round

- our delivery: a `Consumer` whose handler only counts, so all that is measured is fetching, decoding,
  the check that the journal has each event, and the delivery rules;
- plain FastStream: a batch subscriber with the same settings whose handler decodes each record and calls the same handler
  (target: ours >= 0.8x of it);
- bare FastStream: the same without FastStream's own parsing of the records, which ours leaves out as well;
- consumers `jobs` and `routes` as they are, into a new SQLite file, beside what `put_all` takes for the same documents in the
  same batches (target: >= 5,000 events/s, or >= 0.9x of that).
"""

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage

from benchmarks.histories import PER_JOB, history
from benchmarks.publish import Stopwatch, Took, broker
from consumers import jobs, routes
from events.base import Cause, Envelope, Event
from events.deployments import DeploymentApplied, DeploymentReady, DeployRequested, Scale
from events.registry import decode
from events.topics import Topic
from events.types import DeploymentKind, new_id
from mini_studio import logs
from mini_studio.bus.consumer import Consumer, start_broker
from mini_studio.bus.delivery import no_decoding, parse
from mini_studio.bus.kafka import create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.records.record import ANYONE
from mini_studio.records.store import Collection, Document
from mini_studio.settings import Kafka, Log, Settings
from mini_studio.wiring import Studio, open_studio

Change = tuple[Document, int | None]
PER_DEPLOYMENT = 3


class Counting:
    """From the first event to the last."""

    def __init__(self, expected: int) -> None:
        self._expected, self._count = expected, 0
        self._watch: Stopwatch | None = None
        self.done: asyncio.Future[Took] = asyncio.get_running_loop().create_future()

    def handled(self, count: int) -> None:
        self._watch = self._watch or Stopwatch()
        self._count += count
        if self._count >= self._expected and not self.done.done():
            self.done.set_result(self._watch.took(self._count))


def a_deployment() -> list[Envelope[Event]]:
    """The events of one deployment that came up."""
    id = new_id("dep")
    name = f"vllm-base-{id[-12:]}"
    scale = Scale(gpu_count=0, min_replicas=1, max_replicas=1, prometheus_threshold=5)
    told: list[tuple[Event, int]] = [
        (
            DeployRequested(
                deployment_id=id,
                generation=1,
                name=name,
                kind=DeploymentKind.BASE,
                model="m",
                base_model="m",
                scale=scale,
            ),
            1,
        ),
        (DeploymentApplied(deployment_id=id, generation=1, name=name), 1),
        (DeploymentReady(deployment_id=id, generation=1, name=name, endpoints=["http://127.0.0.1:9"], replicas=1), 2),
    ]
    cause = Cause(correlation_id="benchmark")
    return [Envelope.of(e, subject=id, sequence=n, client_code="bench", cause=cause) for e, n in told]


async def fill(studio: Studio, count: int) -> None:
    """Journal and publish the events of `count` jobs and `count` deployments."""
    for told in (lambda: history(new_id("job")), a_deployment):
        entries = [envelope.stored() for _ in range(count) for envelope in told()]
        await studio.store.journal(entries)
        for first in range(0, len(entries), 1000):
            await studio.publisher.publish([outgoing(entry) for entry in entries[first : first + 1000]])


async def counted(studio: Studio, kafka_broker: KafkaBroker, counting: Counting) -> Took:
    """What the broker's subscribers take until everything is handled."""
    await start_broker(kafka_broker, studio.settings.kafka)
    took = await asyncio.wait_for(counting.done, 300)
    await kafka_broker.stop()
    return took


async def ours(studio: Studio, events: int) -> Took:
    counting, consumer = Counting(events), Consumer("jobs", group=str(uuid.uuid4()))

    @consumer.on(*jobs.consumer.handlers)
    async def count(envelope: Envelope[Any], studio: Studio) -> None:
        counting.handled(1)

    return await counted(studio, consumer.broker(studio.settings.kafka, studio.publisher, studio), counting)


async def plain(studio: Studio, events: int, **parsing: Any) -> Took:
    """FastStream with the settings of `Consumer.broker`, and none of our rules."""
    counting, kafka = Counting(events), studio.settings.kafka
    kafka_broker = KafkaBroker(kafka.bootstrap, acks="all", allow_auto_create_topics=False, logger=None)

    async def count(envelope: Envelope[Any], studio: Studio) -> None:
        counting.handled(1)

    @kafka_broker.subscriber(
        Topic.FINE_TUNES.value, group_id=str(uuid.uuid4()), batch=True, max_records=jobs.consumer.max_records,
        batch_timeout_ms=1000, auto_offset_reset="earliest", ack_policy=AckPolicy.NACK_ON_ERROR,
        session_timeout_ms=kafka.session_timeout_ms, fetch_max_wait_ms=kafka.fetch_wait_ms,
        **parsing,
    )  # fmt: skip
    async def handle(message: KafkaMessage) -> None:
        for record in message.raw_message:
            headers = {name: value.decode() for name, value in record.headers}
            await count(decode(record.key, headers, record.value), studio)

    return await counted(studio, kafka_broker, counting)


@contextlib.asynccontextmanager
async def a_studio(kafka: Kafka) -> AsyncIterator[Studio]:
    """On a new record file."""
    with tempfile.TemporaryDirectory() as data:
        async with open_studio(Settings(data=Path(data), kafka=kafka)) as studio:
            yield studio


async def projected(real: Consumer, filled: Studio, events: int) -> tuple[Took, Took]:
    """What a projection consumer takes into a new file (with the same journal), and what its writes alone take."""
    consumer, counting = Consumer(real.name, group=str(uuid.uuid4())), Counting(events)
    project = real._projector
    assert project is not None

    @consumer.projects(*real.handlers)
    async def follow(envelopes: list[Envelope[Any]], studio: Studio) -> None:
        counting.handled(0)
        await project(envelopes, studio)
        counting.handled(len(envelopes))

    kafka = filled.settings.kafka
    async with a_studio(kafka) as studio:
        await studio.store.journal([entry.stored for entry in await filled.store.read_journal(limit=1_000_000)])
        put_all, writes = studio.store.put_all, list[tuple[Collection, Sequence[Change]]]()

        async def noted(collection: Collection, changes: Sequence[Change]) -> list[bool]:
            writes.append((collection, changes))
            return await put_all(collection, changes)

        studio.store.put_all = noted  # type: ignore[method-assign]
        took = await counted(studio, consumer.broker(kafka, studio.publisher, studio), counting)
    async with a_studio(kafka) as studio:
        await studio.jobs.get_all(ANYONE, [])  # opens the file
        watch = Stopwatch()
        for collection, changes in writes:
            await studio.store.put_all(collection, changes)
        return took, watch.took(events)


async def measure(kafka: Kafka, count: int, rounds: int) -> None:
    await create_topics(kafka)
    tunes, deployments = count * PER_JOB, count * PER_DEPLOYMENT
    ratios: dict[str, list[float]] = {}
    async with a_studio(kafka) as filled:
        await fill(filled, count)
        for number in range(1, rounds + 1):
            base = await plain(filled, tunes)
            print(f"round {number}: plain FastStream {base}", flush=True)
            note(ratios, "bare FastStream", await plain(filled, tunes, parser=parse, decoder=no_decoding), base)
            note(ratios, "our delivery", await ours(filled, tunes), base)
            note(ratios, "jobs", *await projected(jobs.consumer, filled, tunes))
            note(ratios, "routes", *await projected(routes.consumer, filled, deployments))
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f}x")


def note(ratios: dict[str, list[float]], name: str, took: Took, base: Took) -> None:
    ratios.setdefault(name, []).append(took.rate / base.rate)
    print(f"  {name} {took.beside(base)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", help="a running Apache Kafka; without it, an embedded broker is started")
    parser.add_argument("--jobs", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logs.configure(Log(), "benchmark")
    with broker(args.bootstrap) as kafka:
        asyncio.run(measure(kafka, args.jobs, args.rounds))


if __name__ == "__main__":
    main()
