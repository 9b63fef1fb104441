"""Publishing through outbox and relay against raw aiokafka: `python -m benchmarks.publish [--bootstrap HOST:PORT]`.

Without `--bootstrap` it starts the embedded broker, which has no idempotent producers; with it, it publishes to that Apache
Kafka, and idempotently. Every round publishes the same EVENTS records three times, and prints events a second of

- raw aiokafka: 64 writers that each wait for the ack of one record before they send the next (`acks=all`);
- the relay alone: the outboxes of EVENTS documents are full beforehand; from the relay's start to its last settle, so with
  the journal and the record store;
- end to end: 64 writers that each insert one record with its event, while the relay of the same process empties the outboxes.

The ratio is the median over the rounds; the target is the relay alone >= 0.5x raw aiokafka.
"""

import argparse
import asyncio
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from aiokafka import AIOKafkaProducer

from benchmarks.histories import history
from events.types import new_id
from mini_studio import logs
from mini_studio.bus.kafka import Outgoing, create_topics
from mini_studio.bus.relay import Relay, outgoing
from mini_studio.records.jobs import Job
from mini_studio.settings import Kafka, Log, Records, Settings
from mini_studio.wiring import Studio, open_studio
from tests.fakes.broker import running_broker

WRITERS = 64
TARGET = 0.5
T = TypeVar("T")


@dataclass(frozen=True)
class Took:
    """What so many events took, by the clock and of the processor: the latter also tells something while others use it."""

    events: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.events / self.seconds

    def beside(self, base: "Took") -> str:
        cpu = base.cpu_seconds / base.events * self.events / self.cpu_seconds
        return f"{self} = {self.rate / base.rate:.2f}x by the clock, {cpu:.2f}x by CPU"

    def __str__(self) -> str:
        return f"{self.rate:,.0f}/s, {self.cpu_seconds / self.events * 1e6:.0f} us of CPU an event"


class Stopwatch:
    """Started when it is made."""

    def __init__(self) -> None:
        self._clock, self._cpu = time.perf_counter(), time.process_time()

    def took(self, events: int) -> Took:
        return Took(events, time.perf_counter() - self._clock, time.process_time() - self._cpu)


def a_job() -> Job:
    """A job as the API inserts it, with its request in the outbox."""
    asked = history(new_id("job"))[0]
    job = Job.begin(asked)
    assert job is not None
    return job.model_copy(update={"outbox": (asked.stored(),)})


async def by_many(things: Iterable[T], do: Callable[[T], Awaitable[object]]) -> None:
    """Each of `WRITERS` takes the next thing when it is done with its last one."""
    left = iter(things)

    async def write() -> None:
        for thing in left:
            await do(thing)

    await asyncio.gather(*(write() for _ in range(WRITERS)))


async def raw(kafka: Kafka, records: list[Outgoing]) -> Took:
    async with AIOKafkaProducer(
        bootstrap_servers=kafka.bootstrap, acks="all", enable_idempotence=kafka.idempotent
    ) as producer:
        await producer.partitions_for(records[0].topic)
        watch = Stopwatch()
        await by_many(
            records, lambda r: producer.send_and_wait(r.topic, key=r.key, value=r.value, headers=list(r.headers))
        )
        return watch.took(len(records))


@contextlib.asynccontextmanager
async def a_studio(kafka: Kafka) -> AsyncIterator[Studio]:
    """On a new record file, with a producer that is connected."""
    with tempfile.TemporaryDirectory() as data:
        # a busy machine must not end the benchmark: 64 writers queue for one file
        settings = Settings(data=Path(data), kafka=kafka, records=Records(busy_timeout_s=60))
        async with open_studio(settings) as studio:
            await studio.publisher.publish([outgoing(entry) for entry in a_job().outbox])
            yield studio


async def relay_alone(kafka: Kafka, jobs: list[Job]) -> Took:
    async with a_studio(kafka) as studio:
        await studio.store.put_all(Job.COLLECTION, [(job.document(), None) for job in jobs])
        relay = Relay(studio.store, studio.publisher, [Job.COLLECTION])
        watch = Stopwatch()
        while await relay.sweep():
            pass
        took = watch.took(len(jobs))
        await nothing_left(studio, len(jobs))
        return took


async def end_to_end(kafka: Kafka, jobs: list[Job]) -> Took:
    async with a_studio(kafka) as studio:
        relay = Relay(studio.store, studio.publisher, [Job.COLLECTION])
        studio.jobs._wake = relay.wake
        relaying = asyncio.create_task(relay.run())
        watch = Stopwatch()
        await by_many(jobs, studio.jobs.insert)
        while await studio.store.pending([Job.COLLECTION], 1):
            await asyncio.sleep(0.005)
        took = watch.took(len(jobs))
        relaying.cancel()
        await asyncio.gather(relaying, return_exceptions=True)
        await nothing_left(studio, len(jobs))
        return took


async def nothing_left(studio: Studio, expected: int) -> None:
    assert not await studio.store.pending([Job.COLLECTION], 1)
    assert len(await studio.store.read_journal(limit=expected + 1)) == expected


@contextlib.contextmanager
def broker(bootstrap: str | None) -> Iterator[Kafka]:
    """The Apache Kafka that was named, or an embedded broker."""
    if bootstrap is not None:
        yield Kafka(bootstrap=bootstrap, idempotent=True)
        return
    with running_broker() as address:
        yield Kafka(bootstrap=address)


async def measure(kafka: Kafka, events: int, rounds: int) -> None:
    await create_topics(kafka)
    ratios = []
    for number in range(1, rounds + 1):
        jobs = [a_job() for _ in range(events)]
        gc.collect()
        gc.freeze()  # or the collector walks through all these jobs again and again, whoever allocates
        base = await raw(kafka, [outgoing(entry) for job in jobs for entry in job.outbox])
        print(f"round {number}: raw aiokafka {base}", flush=True)
        relayed = await relay_alone(kafka, jobs)
        print(f"  relay alone {relayed.beside(base)}", flush=True)
        ratios.append(relayed.rate / base.rate)
        print(f"  end to end {(await end_to_end(kafka, jobs)).beside(base)}", flush=True)
    print(f"relay alone: {statistics.median(ratios):.2f}x raw aiokafka (target {TARGET}x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bootstrap", help="a running Apache Kafka; without it, an embedded broker is started")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logs.configure(Log(), "benchmark")
    with broker(args.bootstrap) as kafka:
        asyncio.run(measure(kafka, args.events, args.rounds))


if __name__ == "__main__":
    main()
