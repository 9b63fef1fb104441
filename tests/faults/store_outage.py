"""An outage of the record store under load, and what the studio owes its clients in it."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from mini_studio.settings import Settings
from tests.fakes.running import Running
from tests.faults import history, load
from tests.faults.checker import collect, violations
from tests.faults.history import History
from tests.faults.load import Load

PER_SECOND = 10.0
WARM_UP_S = 5
CAUGHT_UP_S = 60
CONSUMERS = ("datasets", "training", "serving", "jobs", "routes")
PARTITIONS = 3


class Outage(Protocol):
    def stand_still(self, studio: Running) -> None:
        """Stop the consumers, so that they have something to do when they find nobody there."""

    def begin(self) -> None: ...

    def end(self) -> None:
        """Return when the store is there again."""


def ride_out(
    name: str,
    outage: Outage,
    studio: Running,
    settings: Settings,
    file: Path,
    *,
    seconds: float,
    refused_s: float,
    says: str,
    unfinished: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Load before, during and after it: writes are refused soon, consumers wait, inference goes on, nothing is lost."""
    clients = Load(studio, History(file), per_second=PER_SECOND)
    clients.prepare()
    clients.start()
    time.sleep(WARM_UP_S)
    before = retries(studio)
    outage.stand_still(studio)
    time.sleep(2)
    outage.begin()
    down = time.time()
    send(studio, signal.SIGCONT)
    time.sleep(seconds)
    tries = {name: count - before[name] for name, count in retries(studio).items()}
    back = time.time()
    outage.end()
    up = time.time()
    time.sleep(5)
    clients.stop()
    Running.until(lambda: not unfinished(), CAUGHT_UP_S)
    caught_up_s = time.time() - up
    dead = sum(metric(studio, name, "mini_studio_dead_letters_total") for name in CONSUMERS)
    dump = asyncio.run(collect(settings))

    # what was asked at the last moment may have found the store back
    writes = clients.of("upload", "submit", "deploy", since=down, until=back - refused_s)
    health = clients.of("health", since=down, until=back - refused_s)
    answers = clients.of("infer", since=down, until=back)
    with capsys.disabled():
        print(
            f"\n{name} for {back - down:.0f} s: writes refused {load.figures(writes)}, "
            f"inference {load.figures(answers)}; retries {tries}, dead letters {dead:.0f}; "
            f"all was done {caught_up_s:.1f} s after its end; {len(dump.journal)} events"
        )
    assert clients.broke == []
    assert writes
    assert {(a.status, bool(a.retry_after)) for a in writes} == {(503, True)}
    assert max(a.seconds for a in writes) <= refused_s
    assert {a.body["status"] for a in health} == {"degraded"}
    assert all(says in a.body["problems"]["records"] for a in health)
    assert {a.status for a in clients.of("infer")} == {200}
    assert sum(tries.values()) > 0, "no consumer met the outage"
    assert max(tries.values()) <= PARTITIONS * (back - down)
    assert dead == 0
    assert violations(dump, history.read(file), all_over=False) == []


def send(studio: Running, signum: int) -> None:
    """To all consumers."""
    for name in CONSUMERS:
        for pid in studio.children("mini_studio.cli", "consume", name):
            os.kill(pid, signum)


def retries(studio: Running) -> dict[str, float]:
    return {name: metric(studio, name, "mini_studio_event_retries_total") for name in CONSUMERS}


def metric(studio: Running, consumer: str, name: str) -> float:
    """A counter of one consumer's process; 0 as long as nothing was counted."""
    text = studio.get(studio.run_file["health"][consumer].replace("/health", "/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))
