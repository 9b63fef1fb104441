"""What one record costs, and whether that depends on how many there are: `python -m benchmarks.record_store STORE [RECORDS]`.

STORE is a new folder, for SQLite, or the URL of a MongoDB, where a new database `benchmark_...` is made and left. At 1,000
records, and each ten times as many up to RECORDS (default 100,000), p50 and p99 in ms of: creating a job with its event in
the outbox; a compare-and-set of one; reading one; a page of 100 of a client who owns a tenth of all, the newest and from the
middle; and the outboxes that wait, which are 10 then. Flat means that the last row is what the first one is.
"""

import argparse
import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from benchmarks.histories import history
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold, timestamp
from mini_studio.records.store import Document, RecordStore
from mini_studio.settings import Records, Settings
from mini_studio.wiring import record_store

SAMPLES, WARM_UP = 200, 20
CLIENTS = 10
PAGE = 100
AT_ONCE = 500
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)

Ask = Callable[[int], Awaitable[Any]]


class Filled:
    """A store with so many finished jobs, one a second, the clients by turns."""

    def __init__(self, store: RecordStore) -> None:
        self.store = store
        self.count = 0
        self._versions: dict[int, int] = {}
        """Of those that were written more than once."""
        told = history(new_id("job"))
        record = fold(Job, told)
        assert record is not None
        self._job, self._asked = record.document(), told[0].stored()

    def job(self, number: int, *, waiting: bool = False) -> Document:
        at = timestamp(BEGAN + timedelta(seconds=number))
        return {
            **self._job,
            "_id": f"job_{number:012}",
            "client_code": f"client{number % CLIENTS}",
            "created_at": at,
            "updated_at": at,
            "version": 1,
            "outbox": [self._asked] if waiting else [],
        }

    async def fill(self, count: int) -> None:
        while self.count < count:
            until = min(count, self.count + AT_ONCE)
            await self.store.put_all(Job.COLLECTION, [(self.job(n), None) for n in range(self.count, until)])
            self.count = until

    async def create(self, _: int) -> None:
        await self.store.insert(Job.COLLECTION, self.job(self.count, waiting=True))
        self.count += 1

    async def settle(self, number: int) -> None:
        event = self._asked["headers"]["ce_id"]
        await self.store.settle([(Job.COLLECTION, f"job_{number:012}", [event])])
        self._versions[number] = 2

    async def change(self, sample: int) -> None:
        number = sample * 7919 % (self.count - CLIENTS)  # the last ones wait
        version = self._versions.get(number, 1)
        self._versions[number] = version + 1
        changed = {**self.job(number), "version": version + 1}
        assert await self.store.replace(Job.COLLECTION, changed, version)

    async def get(self, sample: int) -> None:
        assert await self.store.get(Job.COLLECTION, f"job_{sample * 7919 % self.count:012}")

    async def newest(self, sample: int) -> None:
        where = {"client_code": f"client{sample % CLIENTS}"}
        assert len(await self.store.find(Job.COLLECTION, where, limit=PAGE)) == PAGE

    async def middle(self, sample: int) -> None:
        last = self.job(self.count // 2 + PAGE * CLIENTS // 2)
        where = {"client_code": f"client{sample % CLIENTS}"}
        after = (last["created_at"], last["_id"])
        assert len(await self.store.find(Job.COLLECTION, where, limit=PAGE, after=after)) >= PAGE // 2

    async def pending(self, _: int) -> None:
        assert len(await self.store.pending([Job.COLLECTION], 100)) == CLIENTS


async def timed(ask: Ask) -> str:
    """p50 and p99 of it, in ms."""
    taken = []
    for sample in range(WARM_UP + SAMPLES):
        began = time.perf_counter()
        await ask(sample)
        taken.append((time.perf_counter() - began) * 1000)
    ordered = sorted(taken[WARM_UP:])
    return f"{ordered[SAMPLES // 2]:.2f} / {ordered[SAMPLES * 99 // 100 - 1]:.2f}"


def records_at(place: str) -> Records:
    """Patient ones: a bulk of 500 may take seconds."""
    if place.startswith("mongodb"):
        database = f"benchmark_{uuid.uuid4().hex[:8]}"
        return Records(mongo_url=SecretStr(place), mongo_database=database, busy_timeout_s=60)
    return Records(sqlite=Path(place) / "records.sqlite", busy_timeout_s=60)


async def main(place: str, most: int) -> None:
    store = record_store(Settings(records=records_at(place)))
    await store.prepare()
    filled = Filled(store)
    print("| records | create | compare-and-set | read one | newest page | page in the middle | waiting outboxes |")
    print("|---|---|---|---|---|---|---|")
    size = 1000
    while size <= most:
        await filled.fill(size)
        first = filled.count
        row = [await timed(filled.create)]
        for number in range(first, filled.count - CLIENTS):
            await filled.settle(number)
        row += [await timed(ask) for ask in (filled.change, filled.get, filled.newest, filled.middle, filled.pending)]
        print(f"| {size:,} | {' | '.join(row)} |", flush=True)
        for number in range(filled.count - CLIENTS, filled.count):
            await filled.settle(number)
        size *= 10
    await store.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record_store", description=__doc__)
    parser.add_argument("store", metavar="STORE")
    parser.add_argument("records", metavar="RECORDS", type=int, nargs="?", default=100_000)
    options = parser.parse_args()
    asyncio.run(main(options.store, options.records))
