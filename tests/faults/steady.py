"""A whole embedded studio under a light, steady load: does any of its processes keep growing?

`python -m tests.faults.steady [MINUTES]` prints one line per process: the slope of its resident memory by least squares over what was
sampled after the warm-up, with its standard error, and its file descriptors then and now.
"""

import argparse
import asyncio
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

    def slope(self) -> tuple[float, float]:
        """MiB/h by least squares, and its standard error as if the samples were independent."""
        n = len(self.hours)
        mean_x, mean_y = sum(self.hours) / n, sum(self.rss_mib) / n
        spread = sum((x - mean_x) ** 2 for x in self.hours)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(self.hours, self.rss_mib, strict=True)) / spread
        rest = [y - mean_y - slope * (x - mean_x) for x, y in zip(self.hours, self.rss_mib, strict=True)]
        return slope, float((sum(r * r for r in rest) / (n - 2) / spread) ** 0.5)

    def line(self) -> str:
        slope, error = self.slope()
        return (
            f"steady: {self.name:<9} {slope:+8.2f} MiB/h (+-{error:.2f}), {self.rss_mib[0]:.1f} -> {self.rss_mib[-1]:.1f} MiB, "
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
    load, over = Load(studio.url, every_s=1.0, submit_every_s=30.0), asyncio.Event()
    await load.deploy()
    running = asyncio.create_task(load.run(over))
    await asyncio.sleep(warm_up_minutes * 60)
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
    parser.add_argument("--warm-up", type=float, default=25.0, help="minutes before the first sample")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.minutes, options.warm_up)))
