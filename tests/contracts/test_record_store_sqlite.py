"""What only the record store in a SQLite file has to do."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from mini_studio.errors import Unavailable
from mini_studio.records.sqlite import SqliteStore
from mini_studio.records.store import DuplicateRecord
from tests.contracts.test_record_store import THINGS, thing


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    store = SqliteStore(tmp_path / "records.sqlite", [THINGS], busy_timeout_s=0.3)
    yield store
    await store.aclose()


async def test_a_locked_store_is_unavailable_soon(store: SqliteStore, tmp_path: Path) -> None:
    await store.insert(THINGS, thing("a"))
    lock = sqlite3.connect(tmp_path / "records.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        await store.insert(THINGS, thing("b"))
    assert await store.get(THINGS, "a") is not None, "readers go on"
    before = time.monotonic()
    queued = await asyncio.gather(*(store.insert(THINGS, thing(f"q{n}")) for n in range(20)), return_exceptions=True)
    assert all(isinstance(answer, Unavailable) for answer in queued)
    assert time.monotonic() - before < 3, "nobody waits for those before him"
    lock.execute("ROLLBACK")
    lock.close()
    await store.insert(THINGS, thing("b"))


async def test_a_new_store_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    for attempt in range(40):
        stores = [SqliteStore(tmp_path / f"{attempt}.sqlite", [THINGS]) for _ in range(8)]
        await asyncio.gather(*(work for s in stores for work in (s.get(THINGS, "a"), s.settle([(THINGS, "a", [])]))))
        for store in stores:
            await store.aclose()


async def test_a_file_of_before_the_outbox_had_its_column_is_brought_over(tmp_path: Path) -> None:
    file = tmp_path / "records.sqlite"
    old = sqlite3.connect(file, isolation_level=None)
    old.execute(
        "CREATE TABLE things (id TEXT PRIMARY KEY, version INTEGER NOT NULL, "
        "pending INTEGER NOT NULL, doc TEXT NOT NULL) WITHOUT ROWID"
    )
    old.execute("CREATE UNIQUE INDEX things_u_name ON things (doc ->> '$.name')")
    held = [thing("a", events=2), thing("b")]
    for document in held:
        row = (document["_id"], 1, int(bool(document["outbox"])), orjson.dumps(document).decode())
        old.execute("INSERT INTO things VALUES (?, ?, ?, ?)", row)
    old.close()
    store = SqliteStore(file, [THINGS])
    assert [await store.get(THINGS, document["_id"]) for document in held] == held
    await store.settle([(THINGS, "a", ["a-0", "a-1"])])
    assert await store.pending([THINGS], 10) == []
    with pytest.raises(DuplicateRecord):
        await store.insert(THINGS, thing("c", name="a"))
    await store.aclose()


class Guarded(SqliteStore):
    """Fails when a cursor leaves its thread: freed elsewhere, it would reset a statement that the next write is using."""

    async def _write(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        result = await super()._write(work)
        assert not isinstance(result, sqlite3.Cursor)
        return result


async def test_no_cursor_leaves_its_thread(tmp_path: Path) -> None:
    store = Guarded(tmp_path / "records.sqlite", [THINGS])
    await store.insert(THINGS, thing("a", events=1))
    await store.replace(THINGS, {**thing("a", events=1), "version": 2}, 1)
    await store.put_all(THINGS, [(thing("b"), None)])
    await store.journal(thing("a", events=1)["outbox"])
    await store.settle([(THINGS, "a", ["a-0"])])
    assert len(await store.scan(THINGS, limit=10)) == 2
    await store.clear(THINGS)
    await store.aclose()


@pytest.mark.parametrize("newest_first", [True, False])
async def test_a_page_begins_where_it_begins(newest_first: bool, tmp_path: Path, store: SqliteStore) -> None:
    """By the index, and not by reading everything in front of it."""
    await store.insert(THINGS, thing("a"))
    asked: list[tuple[str, Any]] = []
    real = store._read

    async def read(sql: str, values: Any) -> Any:
        asked.append((sql, values))
        return await real(sql, values)

    store._read = read  # type: ignore[method-assign]
    after = ("2026-01-01", "b" if newest_first else "")
    found = await store.find(THINGS, {"client_code": "acme"}, limit=5, after=after, newest_first=newest_first)
    assert [document["_id"] for document in found] == ["a"]
    (sql, values), sign = asked[0], "<" if newest_first else ">"
    with contextlib.closing(sqlite3.connect(tmp_path / "records.sqlite")) as db:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    assert plan == [f"SEARCH things USING INDEX things_l_client_code (<expr>=? AND <expr>{sign}?)"]
