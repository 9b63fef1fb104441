"""Processes that journal at the same time are killed and frozen between any two steps; whoever reads on misses nothing."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini_studio.records.store import RecordStore
from tests.faults.journal_writer import opened
from tests.faults.length import length

SECONDS = length(short=15, full=180)
HISTORIES = [f"h{number}" for number in range(3)]
"""Two writers at a time have each of them: two relays of one outbox."""
FROZEN_S = 1.5

pytestmark = [pytest.mark.real, pytest.mark.timeout(SECONDS + 180)]


@pytest.fixture(params=["sqlite", "mongo"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "records.sqlite")
    return f"{request.getfixturevalue('mongo_url')}#{request.getfixturevalue('mongo_database')}"


class Writers:
    """Writers that come and go."""

    def __init__(self, place: str, folder: Path) -> None:
        self._place, self._folder = place, folder
        self._started = 0
        self._alive: list[tuple[subprocess.Popen[bytes], str]] = []
        self.killed = self.frozen = 0

    def start(self, name: str) -> None:
        self._started += 1
        command = [sys.executable, "-m", "tests.faults.journal_writer", self._place, name]
        with (self._folder / f"{name}.{self._started}.acked").open("wb") as output:
            self._alive.append((subprocess.Popen(command, stdout=output), name))

    def disturb(self) -> None:
        """Freeze one for a while, or kill one and start another in its place."""
        if random.random() < 0.3:
            process, _ = random.choice(self._alive)
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(FROZEN_S)
            os.kill(process.pid, signal.SIGCONT)
            self.frozen += 1
        else:
            process, name = self._alive.pop(random.randrange(len(self._alive)))
            process.kill()
            process.wait()
            self.start(name)
            self.killed += 1

    def stop(self) -> None:
        for process, _ in self._alive:
            process.kill()
            process.wait()

    def acknowledged(self) -> Iterator[tuple[str, int]]:
        """How far each of them was told that its history is in the journal."""
        for file in self._folder.glob("*.acked"):
            lines = file.read_bytes().split(b"\n")[:-1]
            if lines:
                yield file.name.partition(".")[0], int(lines[-1])


async def follow(store: RecordStore, read: list[str], over: asyncio.Event) -> None:
    position = 0
    while True:
        last = over.is_set()
        entries = await store.read_journal(after=position, limit=random.randint(1, 300))
        if last and not entries:
            return
        read += [entry.event_id for entry in entries]
        position = entries[-1].position if entries else position
        await asyncio.sleep(0.01)


async def up_to_its_end(store: RecordStore) -> list[str]:
    """What a refill would read that begins now."""
    end, position, found = await store.journal_end(), 0, list[str]()
    while position < end and (entries := await store.read_journal(after=position, limit=1000)):
        found += [entry.event_id for entry in entries if entry.position <= end]
        position = entries[-1].position
    return found


async def test_a_reader_misses_nothing(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = opened(place)
    await store.prepare()
    writers = Writers(place, tmp_path)
    read: list[str] = []
    refills: list[list[str]] = []
    over = asyncio.Event()
    following = asyncio.create_task(follow(store, read, over))
    try:
        for name in [*HISTORIES, *HISTORIES]:
            writers.start(name)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(random.uniform(0, 1))
            await asyncio.to_thread(writers.disturb)
            refills.append(await up_to_its_end(store))
    finally:
        writers.stop()
    over.set()
    await asyncio.wait_for(following, 60)
    whole = await up_to_its_end(store)
    await store.aclose()

    with capsys.disabled():
        print(
            f"\n{len(whole)} entries; {writers.killed} writers killed, {writers.frozen} frozen; {len(refills)} refills"
        )
    assert read == whole
    assert all(refill == whole[: len(refill)] for refill in refills)
    numbers: dict[str, list[int]] = defaultdict(list)
    for id in whole:
        name, _, number = id.partition("-")
        numbers[name].append(int(number))
    assert all(told == list(range(len(told))) for told in numbers.values()), "each history once and in order"
    acknowledged = list(writers.acknowledged())
    assert acknowledged
    assert all(done <= len(numbers[name]) for name, done in acknowledged)
    assert writers.killed
    assert refills
