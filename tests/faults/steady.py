"""A whole embedded studio under a light, steady load: does any of its processes keep growing?

`python -m tests.faults.steady [MINUTES]` prints one line per process: the slope of its resident memory over what was sampled after
the warm-up, and its file descriptors then and now.
"""

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from mini_studio.embedded.marks import RUN_DATA, Family
from tests.fakes.broker import free_port
from tests.fakes.running import Running
from tests.faults.light_load import Load

SAMPLE_S = 5.0
EVERY_S, WARM_UP_EVERY_S = 1.0, 0.05
"""Between two requests of a kind. The warm-up is quick, for what is full only after thousands of requests: a table of interned strings,
a cache, the allocator's first arenas."""
SETTLE_S = 10.0
"""After the warm-up, for the consumers to have followed."""
NAMES = {
    "mini_studio.cli api": "api",
    "mini_studio.cli relay": "relay",
    **{f"mini_studio.cli consume {name}": name for name in ("datasets", "training", "serving", "jobs", "routes")},
    "mini_studio.embedded --data": "launcher",
}
"""What of a command line tells whose process it is. Broker and S3 server hold what they were sent: they may grow."""


@dataclass
class Series:
    """One process over time."""

    name: str
    hours: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """MiB/h: the median of the slopes between any two samples (Theil and Sen).

        A single step moves it not at all, and there are such: Python's allocator takes a MiB at once, and the table of interned
        strings, which every path's parts go through, is made anew once it is full. What leaks moves every slope.
        """
        samples = list(zip(self.hours, self.rss_mib, strict=True))
        return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(samples, 2))

    def line(self) -> str:
        return (
            f"steady: {self.name:<9} {self.slope():+8.2f} MiB/h, {self.rss_mib[0]:.1f} -> {self.rss_mib[-1]:.1f} MiB, "
            f"descriptors {min(self.descriptors)} to {max(self.descriptors)}, last {self.descriptors[-1]}"
        )


def processes(studio: Running) -> dict[int, str]:
    """The studio's own processes: name by pid."""
    assert studio.process is not None
    found = {}
    for process in [psutil.Process(studio.process.pid), *Family({RUN_DATA: str(studio.data)}).members()]:
        line = " ".join(process.cmdline())
        for words, name in NAMES.items():
            if words in line:
                found[process.pid] = name
    return found


async def measure(studio: Running, minutes: float, warm_up_minutes: float) -> tuple[list[Series], Load]:
    """Sample for `minutes` after the warm-up. Raises when a process ends meanwhile."""
    # Nothing trains here: every submit stays in the queue, which the training consumer reads again and again.
    load, over = Load(studio.url, every_s=WARM_UP_EVERY_S, submit_every_s=30.0), asyncio.Event()
    await load.deploy()
    running = asyncio.create_task(load.run(over))
    await asyncio.sleep(warm_up_minutes * 60)
    load.every_s = EVERY_S
    await asyncio.sleep(SETTLE_S)
    watched = {psutil.Process(pid): Series(name) for pid, name in sorted(processes(studio).items())}
    began = time.monotonic()
    while time.monotonic() < began + minutes * 60:
        for process, series in watched.items():
            series.hours.append((time.monotonic() - began) / 3600)
            series.rss_mib.append(process.memory_info().rss / 2**20)
            series.descriptors.append(process.num_fds())
        await asyncio.sleep(SAMPLE_S)
    over.set()
    await running
    return list(watched.values()), load


async def main(minutes: float, warm_up_minutes: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        studio = Running(
            Path(folder) / "studio", free_port(), {"MINI_STUDIO_TRAINING__RAY_ADDRESS": "http://127.0.0.1:1"}
        )
        studio.start()
        try:
            series, load = await measure(studio, minutes, warm_up_minutes)
        finally:
            studio.stop()
    print("\n".join(each.line() for each in series))
    print(f"steady: {load.statuses.total()} answers in all, {len(load.failures)} failures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.faults.steady", description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=30.0)
    parser.add_argument("--warm-up", type=float, default=5.0, help="minutes of quick requests before the first sample")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.minutes, options.warm_up)))
