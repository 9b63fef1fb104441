"""How fast the consumers re-read a refilled log: `python benchmarks/catch_up.py DATA [EVENTS]`, on a *stopped* studio's data folder.

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

from events.base import Cause, Envelope, Event
from events.fine_tuning import (
    DatasetRef,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
    Hyperparameters,
)
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold
from mini_studio.records.training_runs import RunPhase, TrainingRun
from mini_studio.settings import Settings
from mini_studio.wiring import open_studio

PER_JOB = 10
PORT = 8399


def history(id: str) -> list[Envelope[Event]]:
    """The events of one job that succeeded."""
    parameters = Hyperparameters(
        n_epochs=1, batch_size=1, learning_rate_multiplier=0.1, prompt_loss_weight=0, seed=0, method="full"
    )
    dataset = DatasetRef(id=new_id("ds"), dfs_path="/d", sha256="0" * 64, rows=3)
    told: list[Event] = [FineTuneQueued(job_id=id, attempt=0), FineTuneStarted(job_id=id, attempt=1, submission_id="s")]
    told += [FineTuneProgressed(job_id=id, attempt=1, step=n, train_loss=1.0) for n in range(PER_JOB - 4)]
    told.append(
        FineTuneSucceeded(
            job_id=id, attempt=1, fine_tuned_model="m", fine_tuned_weights_path="/w", train_loss=1, steps=9, tokens=9
        )
    )
    asked = FineTuneRequested(
        job_id=id, base_model="tiny-llama", fine_tuned_model="m", dataset=dataset, hyperparameters=parameters
    )
    sequence: list[tuple[Event, int]] = [(asked, 1), *((event, n + 1) for n, event in enumerate(told))]
    cause = Cause(correlation_id="benchmark")
    return [Envelope.of(e, subject=id, sequence=n, client_code="bench", cause=cause) for e, n in sequence]


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
