"""A process that journals one history after another's fashion until it is killed: `python -m tests.faults.journal_writer STORE NAME`.

STORE is a file, or a MongoDB's URL with `#DATABASE` behind it. Each batch begins again a few events before its end, as a relay does
that does not know what became of the last one. What was acknowledged is printed, a line each.
"""

import asyncio
import random
import sys
from itertools import count
from pathlib import Path
from typing import Any

from mini_studio.errors import Unavailable
from mini_studio.records.mongo import MongoStore
from mini_studio.records.sqlite import SqliteStore
from mini_studio.records.store import RecordStore


def opened(store: str) -> RecordStore:
    url, _, database = store.partition("#")
    return MongoStore(url, database, []) if database else SqliteStore(Path(store), [])


def entry(name: str, number: int) -> dict[str, Any]:
    return {"topic": "t", "key": name, "headers": {"ce_id": f"{name}-{number}"}, "value": "{}"}


async def main() -> None:
    store, name = opened(sys.argv[1]), sys.argv[2]
    known = await store.journalled([f"{name}-{number}" for number in range(5000)])
    done = len(known)
    for _ in count():
        first, end = max(0, done - random.randint(0, 5)), done + random.randint(1, 30)
        try:
            await store.journal([entry(name, number) for number in range(first, end)])
        except Unavailable:
            continue
        done = end
        print(done, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
