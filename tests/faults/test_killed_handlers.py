"""A consumer's process killed in the middle of its handlers, again and again: nothing is lost, nothing is done twice."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from events.topics import Topic, dead_letter_topic
from events.types import new_id
from mini_studio.bus.kafka import create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import Studio, open_studio
from tests.consumers.cases import envelope, fine_tune
from tests.fakes.log import read_all
from tests.faults.length import length
from tests.faults.logs import BROKERS, a_log

SESSION_MS = 1500
BYSTANDERS = 4
"""Events around each one that kills."""


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bootstrap(broker: str, tmp_path: Path) -> Iterator[str]:
    with a_log(broker, tmp_path) as address:
        yield address


@pytest.fixture
async def studio(bootstrap: str, tmp_path: Path) -> AsyncIterator[Studio]:
    kafka = Kafka(bootstrap=bootstrap, partitions=3)
    await create_topics(kafka)
    async with open_studio(Settings(data=tmp_path / "data", kafka=kafka)) as studio:
        yield studio


@contextlib.contextmanager
def consuming(studio: Studio, plan: Path) -> Iterator[subprocess.Popen[bytes]]:
    kafka = studio.settings.kafka
    with plan.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.killed_consumers", str(plan)],
            env={
                **os.environ,
                "MINI_STUDIO_DATA": str(studio.settings.data),
                "MINI_STUDIO_KAFKA__BOOTSTRAP": kafka.bootstrap,
                "MINI_STUDIO_KAFKA__SESSION_TIMEOUT_MS": str(SESSION_MS),
                "MINI_STUDIO_KAFKA__FETCH_WAIT_MS": "20",
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def is_done(studio: Studio, job: str) -> bool:
    found, run = await studio.jobs.get("acme", job), await studio.runs.get("acme", job)
    return bool(found and found.applied == {"api": 1, "training": 1} and run and not run.outbox)


async def until_killed_or_done(process: subprocess.Popen[bytes], studio: Studio, jobs: list[str], left: int) -> bool:
    """Whether everything is done; False when the process was killed before, as it is while kills are left."""
    deadline = time.monotonic() + 120
    while process.poll() is None:
        if not left and all([await is_done(studio, job) for job in jobs]):
            return True
        assert time.monotonic() < deadline, "neither killed nor done"
        await asyncio.sleep(0.2)
    assert process.returncode == -signal.SIGKILL
    return False


@pytest.mark.timeout(3600)
async def test_a_consumer_killed_in_mid_handler_loses_nothing(studio: Studio, broker: str, tmp_path: Path) -> None:
    # the embedded broker takes five seconds for each group to join again
    kills = 3 if broker == "embedded" else int(length(short=10, full=100))
    jobs = [new_id("job") for _ in range(kills * BYSTANDERS)]
    places = [(consumer, when) for consumer in ("training", "jobs") for when in ("before", "after")]
    plan = {f"{places[n % 4][0]} {jobs[n * BYSTANDERS]}": places[n % 4][1] for n in range(kills)}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    entries = [envelope(fine_tune(job), job).stored() for job in jobs]
    await studio.store.journal(entries)
    await studio.publisher.publish([outgoing(entry) for entry in entries])

    killed = 0
    while True:
        with consuming(studio, file) as process:
            if await until_killed_or_done(process, studio, jobs, kills - killed):
                break
            killed += 1
    assert killed == kills == len(file.with_suffix(".kills").read_text().splitlines())
    for job in jobs:
        run = await studio.runs.get("acme", job)
        assert run is not None and run.sequence == 1
        history = [entry.stored["headers"]["ce_type"] for entry in await studio.store.read_journal(key=job)]
        assert history == ["fine_tune.requested.v1", "fine_tune.queued.v1"], "claimed once"
    for consumer in ("jobs", "training"):
        assert not await read_all(studio.settings.kafka.bootstrap, dead_letter_topic(Topic.FINE_TUNES, consumer))
