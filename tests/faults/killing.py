"""Kills a studio's processes with -9, one at random at a time, and starts again what nobody else does."""

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.running import Running

Find = Callable[[], list[int]]


@dataclass(frozen=True)
class Kind:
    """One kind of process: how to find those that live, how often it is its turn, and what has to be done afterwards."""

    name: str
    find: Find
    weight: float = 1.0
    restart: Callable[[], None] | None = None


def parts(studio: Running) -> list[Kind]:
    """What the launcher starts, and starts again."""
    consumers = ("datasets", "training", "serving", "jobs", "routes")
    words = {
        "api": "mini_studio.cli api",
        "relay": "mini_studio.cli relay",
        **{f"consumer {name}": f"mini_studio.cli consume {name}" for name in consumers},
        "prepare": "mini_studio.cli prepare",
        "broker": "tansu broker",
        "s3": "serve s3",
        "model server": "-m workloads.serve",
    }
    return [Kind(name, finder(studio, text)) for name, text in words.items()]


def ray(studio: Running) -> list[Kind]:
    """What a Ray head consists of: seldom enough that a head lives long enough to train something between two deaths."""
    words = {
        "ray head": "ray.scripts.scripts start --head",
        "raylet": "raylet/raylet",
        "gcs": "gcs_server",
        "dashboard": "ray/dashboard/dashboard.py",
        "trainer": "-m workloads.train",
    }
    return [Kind(name, finder(studio, text), 0.3) for name, text in words.items()]


def launcher(studio: Running, then: Callable[[], None]) -> Kind:
    """The launcher itself: everything goes with it, as in a power cut. `then` starts what is not its own."""

    def restart() -> None:
        assert studio.process is not None
        studio.process.wait(30)
        studio.log.unlink()
        studio.start()
        then()

    return Kind("launcher", lambda: [studio.process.pid] if studio.process else [], 0.25, restart)


def guardian(studio: Running) -> Kind:
    return Kind("guardian", lambda: of_launcher(studio, "mini_studio.embedded.guardian"), 0.5)


def of_launcher(studio: Running, word: str) -> list[int]:
    """Children of the launcher by their command line: a guardian carries no mark."""
    assert studio.process is not None
    try:
        listed = Path(f"/proc/{studio.process.pid}/task/{studio.process.pid}/children").read_text().split()
    except OSError:
        return []
    return [pid for pid in map(int, listed) if word in command_line(pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def finder(studio: Running, text: str) -> Find:
    return lambda: studio.children(text)


class Killer:
    """A thread that kills until it is stopped. Every kill is a line in `file`."""

    def __init__(self, kinds: list[Kind], seed: str, every_s: float, file: Path) -> None:
        self.kills: Counter[str] = Counter()
        self.last = time.time()
        self.problem: str | None = None
        self._kinds, self._random, self._every_s = kinds, random.Random(f"{seed}/kill"), every_s
        self._file = file
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No kill after this returns, and everything is on its way up again."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            # spread evenly around the mean: some hit what is just starting
            while not self._stop.wait(self._random.uniform(0.1, 1.9) * self._every_s):
                self._kill_one()
        except Exception as error:
            self.problem = f"the killer stopped: {error!r}"
            raise

    def _kill_one(self) -> None:
        weights = [kind.weight for kind in self._kinds]
        kind = self._random.choices(self._kinds, weights)[0]
        pids = kind.find()
        if not pids:
            return
        pid = self._random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.kills[kind.name] += 1
        self.last = time.time()
        with self._file.open("a") as file:
            file.write(json.dumps({"time": self.last, "killed": kind.name, "pid": pid}) + "\n")
        if kind.restart is not None:
            kind.restart()
            self.last = time.time()
