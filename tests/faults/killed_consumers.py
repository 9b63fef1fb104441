"""Consumers `jobs` and `training` as their process runs them; it dies by SIGKILL in the middle of given events.

`python -m tests.faults.killed_consumers PLAN`: a JSON file of the events to die at, `{"<consumer> <subject>": "before" | "after"}`
the effect. Each kills once: a line in `PLAN.kills` says that it did. Settings come from the environment.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consumers.app import CONSUMERS, run
from events.base import Envelope
from mini_studio.bus.consumer import Consumer
from mini_studio.settings import Settings


class Killer:
    """Knows where to die, also across its own deaths."""

    def __init__(self, plan: Path) -> None:
        self.plan: dict[str, str] = json.loads(plan.read_text())
        self.kills = plan.with_suffix(".kills")
        self.done = set(self.kills.read_text().splitlines()) if self.kills.exists() else set()

    def strike(self, consumer: str, events: Sequence[Envelope[Any]], when: str) -> None:
        for event in events:
            place = f"{consumer} {event.subject}"
            if self.plan.get(place) == when and place not in self.done:
                with self.kills.open("a") as file:
                    file.write(place + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, consumer: Consumer) -> None:
        deliver, project = consumer.deliver, consumer._projector

        async def one(event: Envelope[Any], studio: Any) -> None:
            self.strike(consumer.name, [event], "before")
            await deliver(event, studio)
            self.strike(consumer.name, [event], "after")

        async def many(events: list[Envelope[Any]], studio: Any) -> None:
            assert project is not None
            self.strike(consumer.name, events, "before")
            await project(events, studio)
            self.strike(consumer.name, events, "after")

        consumer.deliver = one  # type: ignore[method-assign]
        if project is not None:
            consumer._projector = many
        consumer.services.clear()  # no watcher: nothing is trained here


if __name__ == "__main__":
    killer = Killer(Path(sys.argv[1]))
    for name in ("jobs", "training"):
        killer.watch(CONSUMERS[name])
    asyncio.run(run(["jobs", "training"], Settings(), None))
