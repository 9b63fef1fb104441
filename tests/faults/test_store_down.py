"""Another process holds the record file's lock under load: writes are refused soon, consumers wait, inference goes on, nothing is lost."""

import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini_studio.settings import Settings
from tests.fakes.broker import free_port
from tests.fakes.running import Running
from tests.faults import load
from tests.faults.length import length
from tests.faults.store_outage import ride_out, send

LOCKED_S = length(short=20, full=120)
REFUSED_S = 3.0

pytestmark = [pytest.mark.real, pytest.mark.timeout(LOCKED_S + 600)]


class Locked:
    """Whoever holds the lock."""

    def __init__(self, file: Path) -> None:
        self._db = sqlite3.connect(file, isolation_level=None, timeout=0.5)

    def stand_still(self, studio: Running) -> None:
        """None of the consumers is stopped in the middle of a write."""
        while True:
            send(studio, signal.SIGSTOP)
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                send(studio, signal.SIGCONT)
                time.sleep(0.05)
            else:
                self._db.execute("ROLLBACK")
                return

    def begin(self) -> None:
        self._db.execute("PRAGMA busy_timeout = 20000")
        self._db.execute("BEGIN EXCLUSIVE")

    def end(self) -> None:
        self._db.execute("ROLLBACK")
        self._db.close()


@pytest.fixture
def studio(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path / "data", free_port(), load.environment(tmp_path_factory.getbasetemp()))
    running.start()
    yield running
    running.stop()


def test_the_record_store_is_locked(studio: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ride_out(
        "records locked",
        Locked(studio.data / "records.sqlite"),
        studio,
        Settings(data=studio.data),
        tmp_path / "history",
        seconds=LOCKED_S,
        refused_s=REFUSED_S,
        says="locked",
        unfinished=lambda: load.unfinished(studio),
        capsys=capsys,
    )
