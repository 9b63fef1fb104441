"""The broker is killed, or only keeps silent, for minutes under load: nobody waits for it, and everything leaves when it is back.

The embedded broker comes back empty and is refilled by the launcher; an Apache Kafka comes back with its log.
"""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from mini_studio.settings import Settings
from tests.fakes.broker import free_port, wait_for
from tests.fakes.real_kafka import RealKafka, own_kafka
from tests.fakes.running import Running
from tests.faults import history, load
from tests.faults.checker import Dump, collect, violations
from tests.faults.history import History
from tests.faults.length import length
from tests.faults.load import Answer, Load

DOWN_S = length(short=15, full=600)
PER_SECOND = length(short=10, full=20)
WARM_UP_S = 8
NOTICED_S, LEFT_S = 5, 60
BACK_S = length(short=60, full=30)
P99_S = length(short=1.0, full=0.3)
"""The promises are 30 s and 300 ms; the short form runs where other tests do, and its 1 % is a handful of requests."""
LONGEST_S = 3.0
"""Two seconds for the broker, and what a busy machine takes."""

pytestmark = [pytest.mark.real, pytest.mark.timeout(DOWN_S + 900)]


class Outage(Protocol):
    def begin(self) -> None: ...

    def end(self) -> None:
        """Return when the broker is there again."""


class KilledKafka:
    def __init__(self, kafka: RealKafka) -> None:
        self.begin, self.end = kafka.kill, kafka.start_again


class PausedKafka:
    def __init__(self, kafka: RealKafka) -> None:
        self.begin, self.end = kafka.pause, kafka.resume


class EmbeddedAway:
    """The launcher starts the broker again at once, or when it has kept silent for a while: each gets the signal as soon as it is up."""

    SIGNAL: ClassVar[signal.Signals]

    def __init__(self, studio: Running) -> None:
        self._studio = studio
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._signal_on_sight, daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        signal_embedded(self._studio, signal.SIGCONT)
        wait_for(int(self._studio.bootstrap.rpartition(":")[2]), 60)

    def _signal_on_sight(self) -> None:
        while not self._over.wait(0.05):
            signal_embedded(self._studio, self.SIGNAL)


class KilledEmbedded(EmbeddedAway):
    SIGNAL = signal.SIGKILL


class PausedEmbedded(EmbeddedAway):
    SIGNAL = signal.SIGSTOP


def signal_embedded(studio: Running, signum: int) -> None:
    for pid in studio.children("tansu", "broker"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[RealKafka]:
    """One of this test's own: what stands on a log that others wrote to could not be told from what was made up."""
    with own_kafka(tmp_path / "kafka") as started:
        yield started


@pytest.fixture
def studio(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path / "data", free_port(), load.environment(tmp_path_factory.getbasetemp()))
    yield running
    if running.process is not None:
        running.stop()


@pytest.mark.parametrize("outage", [KilledKafka, PausedKafka])
def test_a_kafka_is_away(
    outage: type[KilledKafka | PausedKafka],
    kafka: RealKafka,
    studio: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    studio.environment |= {
        "MINI_STUDIO_KAFKA__BOOTSTRAP": kafka.bootstrap,
        "MINI_STUDIO_KAFKA__IDEMPOTENT": "true",
    }
    dump = ride_out(outage.__name__, studio, outage(kafka), tmp_path / "history", capsys)
    assert violations(dump, history.read(tmp_path / "history"), all_over=False) == []


@pytest.mark.parametrize("outage", [KilledEmbedded, PausedEmbedded])
def test_the_embedded_broker_is_away(
    outage: type[KilledEmbedded | PausedEmbedded],
    studio: Running,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dump = ride_out(outage.__name__, studio, outage(studio), tmp_path / "history", capsys)
    assert violations(dump, history.read(tmp_path / "history"), all_over=False, ordered=False) == []


def ride_out(name: str, studio: Running, outage: Outage, file: Path, capsys: pytest.CaptureFixture[str]) -> Dump:
    """Load before, during and after the outage, and what the studio owes its clients; what is left when all is done."""
    studio.start()
    clients = Load(studio, History(file), per_second=PER_SECOND)
    clients.prepare()
    clients.start()
    time.sleep(WARM_UP_S)
    outage.begin()
    down = time.time()
    time.sleep(DOWN_S)
    before = load.followed(studio)
    outage.end()
    back = time.time()
    left_s = seconds_until(back, lambda: load.oldest_waiting(studio) > back, LEFT_S)
    moving_s = seconds_until(back, lambda: all(n > before[c] for c, n in load.followed(studio).items()), LEFT_S)
    time.sleep(2)
    clients.stop()
    caught_up_s = seconds_until(back, lambda: not load.unfinished(studio), 120 + DOWN_S)
    dump = asyncio.run(collect(Settings(data=studio.data)))

    writes = clients.of("upload", "submit", "deploy", since=down, until=back)
    noticed_s, well_s = noticed(clients.of("health", since=down), back)
    copies = Counter(envelope.id for envelopes in dump.log.values() for envelope in envelopes)
    with capsys.disabled():
        print(
            f"\n{name} for {back - down:.0f} s: writes {load.figures(writes)}, "
            f"inference {load.figures(clients.of('infer', since=down, until=back))}; "
            f"degraded after {noticed_s:.1f} s, ok again after {well_s:.1f} s; after its return the outboxes were empty in "
            f"{left_s:.1f} s, every consumer worked in {moving_s:.1f} s, all was done in {caught_up_s:.1f} s; "
            f"{len(copies)} events, {copies.total() - len(copies)} of them twice on the log"
        )
    assert clients.broke == []
    assert {a.status for a in writes} <= {200, 201, 202}, Counter((a.kind, a.status) for a in writes)
    assert {a.status for a in clients.of("infer")} == {200}
    assert load.percentile([a.seconds for a in writes], 99) <= P99_S
    assert max(a.seconds for a in writes) <= LONGEST_S
    assert noticed_s <= NOTICED_S
    assert left_s <= LEFT_S
    assert max(moving_s, well_s) <= BACK_S
    return dump


def seconds_until(since: float, condition: Callable[[], object], limit_s: float) -> float:
    """How long after `since` the condition held first."""
    Running.until(condition, limit_s)
    return time.time() - since


def noticed(health: list[Answer], back: float) -> tuple[float, float]:
    """Seconds from the first to the first `degraded`, which has a reason; and from the return to the last one that is not `ok`."""
    ill = [a for a in health if a.body["status"] == "degraded"]
    assert all(a.body["problems"] for a in ill)
    away = [a for a in health if a.asked < back]
    assert away
    assert ill, "nobody noticed"
    unnoticed = [a for a in away if a.asked > ill[0].asked and a.body["status"] == "ok"]
    assert not unnoticed, f"{len(unnoticed)} of {len(away)} said ok in between"
    assert health[-1].body["status"] == "ok", health[-1].body
    return ill[0].asked - health[0].asked, max(0.0, ill[-1].asked - back)
