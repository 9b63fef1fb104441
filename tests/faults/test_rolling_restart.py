"""Every process of a studio under load is asked to stop and comes back, in turn: its clients see nothing of it. On a real Kafka."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes.broker import free_port
from tests.fakes.real_kafka import own_kafka
from tests.fakes.running import Running
from tests.faults.light_load import Load

PARTS = {
    "api": ("mini_studio.cli", "api"),
    "relay": ("mini_studio.cli", "relay"),
    **{name: ("mini_studio.cli", "consume", name) for name in ("datasets", "training", "serving", "jobs", "routes")},
}
"""Words of each process's command line."""
ROUNDS, EXIT_S, CALM_S = 2, 20.0, 3.0

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Running]:
    with own_kafka(tmp_path / "kafka") as kafka:
        environment = {
            "MINI_STUDIO_KAFKA__BOOTSTRAP": kafka.bootstrap,
            "MINI_STUDIO_TRAINING__RAY_ADDRESS": "http://127.0.0.1:1",
            "MINI_STUDIO_LOG__LEVEL": "debug",
        }
        studio = Running(tmp_path / "studio", free_port(), environment)
        studio.start()
        yield studio
        studio.stop()


def restart(studio: Running, name: str) -> float:
    """Ask one process to stop; the seconds until it was gone. Returns when its successor is well."""
    (pid,) = studio.children(*PARTS[name])
    process = psutil.Process(pid)
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    process.wait(60)
    took = time.monotonic() - began
    health = studio.run_file["health"][name]
    studio.until(lambda: studio.children(*PARTS[name]) and studio.get(health).json()["status"] == "ok", 60)
    return took


def redelivered(logs: Path) -> dict[str, int]:
    """By consumer: how often a record was given to it once more."""
    found: dict[str, Counter[str]] = {}
    for log in logs.glob("*.log"):
        for line in log.read_text().splitlines():
            if '"consumer.received"' in line:
                entry = json.loads(line)
                found.setdefault(entry["consumer"], Counter())[entry["place"]] += 1
    return {name: places.total() - len(places) for name, places in found.items()}


async def test_a_rolling_restart_is_seen_by_no_client(studio: Running) -> None:
    load, over = Load(studio.url), asyncio.Event()
    await load.deploy()
    running = asyncio.create_task(load.run(over))
    exits: dict[str, float] = {}
    for name in [*PARTS] * ROUNDS:
        await asyncio.sleep(CALM_S)
        exits[name] = max(exits.get(name, 0.0), await asyncio.to_thread(restart, studio, name))
    await asyncio.sleep(CALM_S)
    over.set()
    await running
    again = redelivered(studio.data / "logs")
    slowest = max(exits, key=lambda name: exits[name])
    print(
        f"rolling restart: {ROUNDS * len(PARTS)} restarts, {load.statuses.total()} answers, {len(load.failures)} failures, "
        f"slowest answer {load.slowest_s:.1f} s, longest exit {exits[slowest]:.1f} s ({slowest}), redelivered {again}"
    )
    print(f"answers: {dict(load.statuses)}")
    assert load.failures == []
    assert exits[slowest] <= EXIT_S
    assert set(again) == {"datasets", "training", "serving", "jobs", "routes", "usage"}
    assert not any(again.values())
