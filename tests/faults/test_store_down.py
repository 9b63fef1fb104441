"""Another process holds the record file's lock under load: writes are refused soon, consumers wait, inference goes on, nothing is lost."""

import asyncio
import os
import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini_studio.settings import Settings
from tests.fakes.broker import free_port
from tests.fakes.running import Running
from tests.faults import history, load
from tests.faults.checker import collect, violations
from tests.faults.history import History
from tests.faults.length import length
from tests.faults.load import Load

LOCKED_S = length(short=20, full=120)
PER_SECOND = 10.0
WARM_UP_S = 5
REFUSED_S, CAUGHT_UP_S = 3.0, 60
CONSUMERS = ("datasets", "training", "serving", "jobs", "routes")
PARTITIONS = 3

pytestmark = [pytest.mark.real, pytest.mark.timeout(LOCKED_S + 600)]


@pytest.fixture
def studio(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path / "data", free_port(), load.environment(tmp_path_factory.getbasetemp()))
    running.start()
    yield running
    running.stop()


def test_the_record_store_is_locked(studio: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clients = Load(studio, History(tmp_path / "history"), per_second=PER_SECOND)
    clients.prepare()
    clients.start()
    time.sleep(WARM_UP_S)
    before = retries(studio)
    lock = sqlite3.connect(studio.data / "records.sqlite", isolation_level=None, timeout=0.5)
    stand_still(studio, lock)  # so that the consumers have something to do when they find the lock
    time.sleep(2)
    lock.execute("PRAGMA busy_timeout = 20000")
    lock.execute("BEGIN EXCLUSIVE")
    locked = time.time()
    send(studio, signal.SIGCONT)
    time.sleep(LOCKED_S)
    lock.execute("ROLLBACK")
    lock.close()
    free = time.time()
    tries = {name: count - before[name] for name, count in retries(studio).items()}
    time.sleep(5)
    clients.stop()
    Running.until(lambda: not load.unfinished(studio), CAUGHT_UP_S)
    caught_up_s = time.time() - free
    dead = sum(metric(studio, name, "mini_studio_dead_letters_total") for name in CONSUMERS)
    dump = asyncio.run(collect(Settings(data=studio.data)))

    # what was asked at the last moment may have found the lock gone
    writes = clients.of("upload", "submit", "deploy", since=locked, until=free - REFUSED_S)
    health = clients.of("health", since=locked, until=free - REFUSED_S)
    answers = clients.of("infer", since=locked, until=free)
    with capsys.disabled():
        print(
            f"\nrecords locked for {free - locked:.0f} s: writes refused {load.figures(writes)}, "
            f"inference {load.figures(answers)}; retries {tries}, dead letters {dead:.0f}; "
            f"all was done {caught_up_s:.1f} s after the lock was gone; {len(dump.journal)} events"
        )
    assert clients.broke == []
    assert writes
    assert {(a.status, bool(a.retry_after)) for a in writes} == {(503, True)}
    assert max(a.seconds for a in writes) <= REFUSED_S
    assert {a.body["status"] for a in health} == {"degraded"}
    assert all("locked" in a.body["problems"]["records"] for a in health)
    assert {a.status for a in clients.of("infer")} == {200}
    assert sum(tries.values()) > 0, "no consumer met the lock"
    assert max(tries.values()) <= PARTITIONS * (free - locked)
    assert dead == 0
    assert violations(dump, history.read(tmp_path / "history"), all_over=False) == []


def stand_still(studio: Running, db: sqlite3.Connection) -> None:
    """Stop the consumers for the moment, none of them in the middle of a write."""
    while True:
        send(studio, signal.SIGSTOP)
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            send(studio, signal.SIGCONT)
            time.sleep(0.05)
        else:
            db.execute("ROLLBACK")
            return


def send(studio: Running, signum: int) -> None:
    for name in CONSUMERS:
        for pid in studio.children("mini_studio.cli", "consume", name):
            os.kill(pid, signum)


def retries(studio: Running) -> dict[str, float]:
    return {name: metric(studio, name, "mini_studio_event_retries_total") for name in CONSUMERS}


def metric(studio: Running, consumer: str, name: str) -> float:
    """A counter of one consumer's process; 0 as long as nothing was counted."""
    text = studio.get(studio.run_file["health"][consumer].replace("/health", "/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))
