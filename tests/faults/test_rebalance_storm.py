"""Members of one group are killed and join every ten seconds under a steady flow of events, on a real Kafka."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from events.topics import Topic
from mini_studio.bus.kafka import create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.records.jobs import Job
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import open_studio
from tests.consumers.cases import a_requested_job
from tests.fakes.log import read_all
from tests.fakes.real_kafka import RealKafka, own_kafka
from tests.fakes.waiting import until
from tests.faults.length import length

ROOT = Path(__file__).parents[2]
MEMBERS, EVERY_S = 3, 10.0
REDELIVERED_AT_MOST = 0.01

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


class Member:
    """`mini-studio consume jobs` as a process; its debug log says what it was given."""

    def __init__(self, folder: Path, name: str, environment: dict[str, str]) -> None:
        self.log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", "mini_studio.cli", "consume", "jobs"]
        self._environment = environment
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command, stdout=output, stderr=output, env={**os.environ, **self._environment}, cwd=ROOT
            )

    def end(self, signum: int) -> None:
        self.process.send_signal(signum)
        self.process.wait(30)

    async def until_started(self) -> None:
        await until(lambda: "consumer.started" in self.log.read_text(), 60)

    def received(self) -> list[tuple[str, float]]:
        """Places in the log, each with the time when it came."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if '"consumer.received"' in line]
        return [(line["place"], datetime.fromisoformat(line["timestamp"]).timestamp()) for line in lines]


async def publish(settings: Settings, count: int, seconds: float) -> dict[str, float]:
    """Requests at a steady rate, journalled as the relay does it: the time of each by job id."""
    sent: dict[str, float] = {}
    began = time.monotonic()
    async with open_studio(settings) as studio:
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number * seconds / count - time.monotonic()))
            job = a_requested_job()
            sent[job.id] = time.time()
            await studio.store.journal(job.outbox)
            await studio.publisher.publish([outgoing(entry) for entry in job.outbox])
    return sent


async def storm(members: list[Member], seconds: float) -> int:
    """Every ten seconds one is killed, or the one that is gone joins; how many were killed."""
    killed, began = 0, time.monotonic()
    while time.monotonic() < began + seconds - EVERY_S:
        await asyncio.sleep(EVERY_S)
        away = [member for member in members if member.process.poll() is not None]
        if away:
            away[0].start()
        else:
            await asyncio.to_thread(members[killed % MEMBERS].end, signal.SIGKILL)
            killed += 1
    return killed


async def records(settings: Settings, expected: int, seconds: float) -> set[str]:
    """The ids of the job records, when all are there or it has taken too long."""
    deadline = time.monotonic() + seconds
    async with open_studio(settings) as studio:
        while True:
            found = await studio.store.find(Job.COLLECTION, {}, limit=1_000_000)
            if len(found) >= expected or time.monotonic() > deadline:
                return {document["_id"] for document in found}
            await asyncio.sleep(0.5)


async def waits(settings: Settings, received: list[tuple[str, float]]) -> list[float]:
    """How long each event on the log waited until it was first given to a member, in seconds; for ever if to none."""
    first: dict[str, float] = {}
    for place, at in received:
        first[place] = min(at, first.get(place, at))
    log = await read_all(settings.kafka.bootstrap, Topic.FINE_TUNES)
    return [first.get(f"{r.topic}/{r.partition}@{r.offset}", float("inf")) - r.timestamp / 1000 for r in log]


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[RealKafka]:
    with own_kafka(tmp_path / "kafka") as kafka:
        yield kafka


async def test_a_storm_of_rebalances_loses_nothing_and_repeats_hardly_anything(
    kafka: RealKafka, tmp_path: Path
) -> None:
    seconds, count = length(short=60, full=300), int(length(short=1000, full=5000))
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=kafka.bootstrap, idempotent=True))
    await create_topics(settings.kafka)
    environment = {
        "MINI_STUDIO_DATA": str(tmp_path),
        "MINI_STUDIO_KAFKA__BOOTSTRAP": kafka.bootstrap,
        "MINI_STUDIO_LOG__LEVEL": "debug",
    }
    members = [Member(tmp_path, f"member-{number}", environment) for number in range(MEMBERS)]
    try:
        await asyncio.gather(*(member.until_started() for member in members))
        sent, killed = await asyncio.gather(publish(settings, count, seconds), storm(members, seconds))
        stored = await records(settings, count, 60)
    finally:
        for member in members:
            member.end(signal.SIGTERM)
    received = [place for member in members for place in member.received()]
    longest = max(await waits(settings, received))
    times = Counter(place for place, _ in received)
    repeated = sum(number - 1 for number in times.values())
    lost = len(sent.keys() - stored)
    print(
        f"rebalance storm: {seconds:.0f} s, {count} events, {killed} kills: {lost} lost, {repeated} redelivered "
        f"({100 * repeated / count:.2f} %), longest wait of an event {longest:.1f} s"
    )
    assert killed >= seconds / EVERY_S / 2 - 1
    assert lost == 0
    assert repeated <= REDELIVERED_AT_MOST * count
    assert longest <= settings.kafka.session_timeout_ms / 1000 + 5
