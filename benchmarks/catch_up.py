"""How fast the consumers re-read a refilled log: `python -m benchmarks.catch_up DATA [EVENTS]`, on a *stopped* studio's data folder.

Writes EVENTS (default 100,000) fine-tune events of finished jobs to the journal and their records to the store, then
starts the studio and prints how long it takes until consumers `jobs` and `training` have handled all of them. Throw the
folder away after.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.histories import PER_JOB, history
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.settings import Settings
from mini_studio.wiring import open_studio

PORT = 8399


async def fill(data: Path, events: int) -> None:
    async with open_studio(Settings(data=data)) as studio:
        for _ in range(events // PER_JOB):
            told = history(new_id("job"))
            job = fold(Job, told)
            assert job is not None
            await studio.jobs.insert(job)
            run = TrainingRun.claim(told[0])  # type: ignore[arg-type]
            await studio.runs.insert(run.model_copy(update={"phase": RunPhase.SUCCEEDED, "outbox": ()}))
            await studio.store.journal([envelope.stored() for envelope in told])


def handled(url: str) -> float:
    """Events that the process at `url` has handled since it started."""
    with urllib.request.urlopen(url.replace("/health", "/metrics")) as response:  # noqa: S310
        found = re.findall(r"^mini_studio_events_in_total\{.*\} (\S+)$", response.read().decode(), re.M)
    return sum(map(float, found))


def main() -> None:
    data, events = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    asyncio.run(fill(data, events))
    started = time.monotonic()
    command = [sys.executable, "-m", "mini_studio.embedded", "--data", str(data), "--port", str(PORT)]
    studio = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    expected = {"jobs": events, "training": events // PER_JOB}  # training takes the requests only
    done: dict[str, float] = {}
    while len(done) < 2 and time.monotonic() - started < 600:
        time.sleep(0.5)
        try:
            health = json.loads((data / "run" / "studio.json").read_text())["health"]
            for name in {"jobs", "training"} - done.keys():
                if handled(health[name]) >= expected[name]:
                    done[name] = time.monotonic() - started
        except (OSError, ValueError, KeyError):
            continue
    studio.terminate()
    studio.wait()
    for name, seconds in done.items():
        print(f"{name}: {events} events caught up {seconds:.1f} s after start")


if __name__ == "__main__":
    main()
