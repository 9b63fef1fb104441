"""How fast, and in how much memory, a projection is rebuilt: `python -m benchmarks.replay NEW_FOLDER [EVENTS]`.

Journals EVENTS (default 1,000,000) events of finished jobs, 100 jobs at a time event by event, as jobs that run at once
leave them. Then `replay jobs` rebuilds and inserts the job records, with its resident memory on the way. The baseline is
what the store alone needs for the same reading and writing: `read_journal` to the end, and `put_all` of the ready
documents in the same batches, with nothing decoded or folded. A folder that has the events already is used as it is.
"""

import asyncio
import sys
import time
from pathlib import Path

import psutil

from benchmarks.histories import PER_JOB, history
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.shadow import shadow_of
from mini_studio.replaying import BATCH, replay
from mini_studio.settings import Settings
from mini_studio.wiring import Studio, open_studio

AT_ONCE = 100
"""Jobs whose events lie between one another."""


async def fill(studio: Studio, events: int) -> None:
    for _ in range(events // PER_JOB // AT_ONCE):
        jobs = [history(new_id("job")) for _ in range(AT_ONCE)]
        await studio.store.journal([told[number].stored() for number in range(PER_JOB) for told in jobs])


async def store_alone(studio: Studio) -> tuple[float, int]:
    """Seconds to read the journal and to write the ready documents; how many events that was."""
    shadow, position, events, after, seconds = shadow_of(Job.COLLECTION), 0, 0, "", 0.0
    documents = await studio.store.scan(Job.COLLECTION, limit=BATCH // PER_JOB)
    while documents:
        started = time.perf_counter()
        entries = await studio.store.read_journal(after=position, limit=BATCH)
        await studio.store.put_all(shadow, [(document, None) for document in documents])
        seconds += time.perf_counter() - started
        position, events, after = entries[-1].position, events + len(entries), documents[-1]["_id"]
        documents = await studio.store.scan(Job.COLLECTION, after=after, limit=BATCH // PER_JOB)
    await studio.store.clear(shadow)
    return seconds, events


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


async def main() -> None:
    data, events = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    memory: list[tuple[str, float]] = []

    def say(text: str) -> None:
        memory.append((text, resident_mib()))

    async with open_studio(Settings(data=data)) as studio:
        await fill(studio, events - await studio.store.journal_end())
        print(f"journalled {events:,} events of {events // PER_JOB:,} jobs; {resident_mib():.0f} MiB resident")
    async with open_studio(Settings(data=data)) as studio:
        for what in ("dropped", "live"):
            memory.clear()
            started = time.perf_counter()
            outcome = (await replay(studio, ["jobs"], topics=False, swap=True, say=say))["jobs"]
            seconds = time.perf_counter() - started
            print(f"replay of {what} jobs: {seconds:.1f} s, {events / seconds:,.0f} events/s; {outcome}")
            for text, mib in memory[:: max(1, len(memory) // 10)]:
                print(f"    {text}: {mib:.0f} MiB resident")
            print(f"    peak {max(mib for _, mib in memory):.0f} MiB")
        seconds, read = await store_alone(studio)
        print(f"the store alone: {seconds:.1f} s, {read / seconds:,.0f} events/s")


if __name__ == "__main__":
    asyncio.run(main())
