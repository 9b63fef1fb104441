"""The record store in one SQLite file, shared by several processes: WAL, a busy timeout, `BEGIN IMMEDIATE` around every write."""

import asyncio
import contextlib
import itertools
import re
import sqlite3
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson

from mini_studio.errors import Unavailable
from mini_studio.records.store import Collection, Document, DuplicateRecord, JournalEntry, in_turns

T = TypeVar("T")

UNIQUE_FAILED = re.compile(r"UNIQUE constraint failed: (?:index '(\w+)'|([\w.]+))")

DOCUMENT = "version, outbox, doc"
"""A document's columns. Version and outbox stand beside the rest, so settling an outbox touches neither the rest nor its indexes."""
MAX_VARIABLES, MAX_ROWS = 500, 500
"""Ids in one query, and rows in one statement: the least limits of the SQLite that Python brings are 999 and 32,766 variables."""
JOURNAL_SCHEMA = """
CREATE TABLE IF NOT EXISTS event_journal (
    position INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, key TEXT NOT NULL, stored BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS event_journal_key ON event_journal (key, position);
"""


class Write:
    """One write that waits for its turn. What fails of several in one transaction leaves the others as they are."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any], deadline: float) -> None:
        self.deadline = deadline
        self.done: Future[Any] = Future()
        self.done.set_running_or_notify_cancel()  # whoever waits may leave; the work is done all the same
        self._work = work
        self._result: Any = None
        self._error: Exception | None = None

    def run(self, db: sqlite3.Connection) -> None:
        """Raises only what ends the whole transaction."""
        self._error = None
        db.execute("SAVEPOINT one")
        try:
            self._result = self._work(db)
        except Exception as error:
            if not db.in_transaction:  # a full disk, for instance
                raise
            db.execute("ROLLBACK TO one")
            self._error = error
        db.execute("RELEASE one")

    def committed(self) -> None:
        """Tell whoever waits how it went."""
        if self._error is None:
            self.done.set_result(self._result)
        else:
            self.done.set_exception(self._error)


class SqliteStore:
    """Implements `RecordStore`. One thread writes and one reads, so a long read never holds up a write."""

    def __init__(self, file: Path, collections: Sequence[Collection], *, busy_timeout_s: float = 2.0) -> None:
        self._file = file
        self._collections = tuple(collections)
        self._busy_timeout_s = busy_timeout_s
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sqlite-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="sqlite-read")
        self._waiting: deque[Write] = deque()
        self._write_connection: sqlite3.Connection | None = None
        self._read_connection: sqlite3.Connection | None = None

    async def prepare(self) -> None:
        await self._read("SELECT 1", ())  # whoever opens the file makes what it lacks

    async def insert(self, collection: Collection, document: Document) -> None:
        await self._write(lambda db: _insert(db, collection, document))

    async def get(self, collection: Collection, id: str) -> Document | None:
        rows = await self._read(f"SELECT {DOCUMENT} FROM {collection.name} WHERE id = ?", (id,))  # noqa: S608
        return _decode(*rows[0]) if rows else None

    async def get_all(self, collection: Collection, ids: Sequence[str]) -> dict[str, Document]:
        rows = await self._read_some(f"SELECT id, {DOCUMENT} FROM {collection.name} WHERE id IN ", ids)  # noqa: S608
        return {id: _decode(*row) for id, *row in rows}

    async def put_all(self, collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        return await self._write(lambda db: _put_all(db, collection, changes))

    async def replace(self, collection: Collection, document: Document, version: int) -> bool:
        return await self._write(lambda db: _replace(db, collection, document, version))

    async def find(
        self,
        collection: Collection,
        where: Mapping[str, Any],
        *,
        limit: int,
        after: tuple[str, str] | None = None,
        newest_first: bool = True,
    ) -> list[Document]:
        conditions = [f"{_field(name)} = ?" for name in where]
        values: list[Any] = list(where.values())
        if after is not None:
            sign = "<" if newest_first else ">"
            # The first condition is the index's bound: SQLite takes no pair for one, and would go through all that is in front.
            conditions += [f"{_field('created_at')} {sign}= ?", f"({_field('created_at')}, id) {sign} (?, ?)"]
            values += [after[0], *after]
        order = "DESC" if newest_first else "ASC"
        filters = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        sql = (
            f"SELECT {DOCUMENT} FROM {collection.name} {filters} "  # noqa: S608
            f"ORDER BY {_field('created_at')} {order}, id {order} LIMIT ?"
        )
        return [_decode(*row) for row in await self._read(sql, (*values, limit))]

    async def scan(self, collection: Collection, *, after: str = "", limit: int) -> list[Document]:
        sql = f"SELECT {DOCUMENT} FROM {collection.name} WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608
        return [_decode(*row) for row in await self._read(sql, (after, limit))]

    async def pending(self, collections: Sequence[Collection], limit: int) -> list[tuple[Collection, Document]]:
        sql = "SELECT id, outbox FROM {} WHERE pending = 1 LIMIT ?"
        each = [await self._read(sql.format(collection.name), (limit,)) for collection in collections]
        waiting = [[{"_id": id, "outbox": outbox} for id, outbox in rows] for rows in each]
        found = in_turns(collections, waiting)[:limit]
        return [(c, {**document, "outbox": orjson.loads(document["outbox"])}) for c, document in found]

    async def settle(self, settled: Sequence[tuple[Collection, str, Sequence[str]]]) -> None:
        by_name: dict[str, list[tuple[str, Sequence[str]]]] = {}
        for collection, id, event_ids in settled:
            by_name.setdefault(collection.name, []).append((id, event_ids))

        def work(db: sqlite3.Connection) -> None:
            for name, part in by_name.items():
                whole = _settle_whole(db, name, part)
                for id, event_ids in part:
                    if id not in whole:
                        _settle(db, name, id, frozenset(event_ids))

        await self._write(work)

    async def clear(self, collection: Collection) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute(f"DELETE FROM {collection.name}")  # noqa: S608

        await self._write(work)

    async def journal(self, stored: Sequence[dict[str, Any]]) -> None:
        rows = [(entry["headers"]["ce_id"], entry["key"], orjson.dumps(entry)) for entry in stored]
        sql = "INSERT INTO event_journal (event_id, key, stored) VALUES {rows} ON CONFLICT (event_id) DO NOTHING"

        def work(db: sqlite3.Connection) -> None:
            _at_once(db, sql, rows)

        await self._write(work)

    async def read_journal(self, *, after: int = 0, limit: int = 1000, key: str | None = None) -> list[JournalEntry]:
        sql = "SELECT position, event_id, stored FROM event_journal WHERE position > ? "
        values: tuple[Any, ...] = (after, limit)
        if key is not None:
            sql += "AND key = ? "
            values = (after, key, limit)
        rows = await self._read(sql + "ORDER BY position LIMIT ?", values)
        return [JournalEntry(row[0], row[1], orjson.loads(row[2])) for row in rows]

    async def journal_end(self) -> int:
        rows = await self._read("SELECT max(position) FROM event_journal", ())
        return rows[0][0] or 0

    async def journalled(self, event_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        rows = await self._read_some("SELECT event_id, stored FROM event_journal WHERE event_id IN ", event_ids)
        return {id: orjson.loads(stored) for id, stored in rows}

    async def aclose(self) -> None:
        for executor, connection in ((self._writer, self._write_connection), (self._reader, self._read_connection)):
            if connection is not None:
                await asyncio.get_running_loop().run_in_executor(executor, connection.close)
            executor.shutdown(wait=False)

    def _connect(self) -> sqlite3.Connection:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._file, timeout=self._busy_timeout_s, isolation_level=None, check_same_thread=False)
        self._into_wal(db)
        db.execute("PRAGMA synchronous = FULL")  # an acknowledged write is on the disk, as `j: true` is elsewhere
        schema = _schema(self._collections)
        made_by = zlib.crc32("".join(schema).encode()) >> 1
        if db.execute("PRAGMA user_version").fetchone()[0] != made_by:
            db.execute("BEGIN IMMEDIATE")
            for collection in self._collections:
                _give_outbox_its_column(db, collection.name)
            for statement in schema:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {made_by}")
            db.execute("COMMIT")
        return db

    def _into_wal(self, db: sqlite3.Connection) -> None:
        """The first to open a new file changes its journal mode; SQLite refuses a second one meanwhile without the busy timeout."""
        deadline = time.monotonic() + self._busy_timeout_s
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do the work in a transaction. Those that wait for the writer share the next one, and so one wait for the disk."""
        write = Write(work, time.monotonic() + self._busy_timeout_s)
        self._waiting.append(write)
        self._writer.submit(self._write_waiting)
        with _outages():
            result: T = await asyncio.wrap_future(write.done)
        return result

    def _write_waiting(self) -> None:
        """Write all that waits, also what comes while the lock is waited for; each is told at its own time."""
        writes: list[Write] = []
        while self._waiting or writes:
            writes += [self._waiting.popleft() for _ in range(len(self._waiting))]
            # Those who queued behind a write that waited for the lock have waited as well: nobody waits twice.
            left_s = min(write.deadline for write in writes) - time.monotonic()
            try:
                self._write_together(writes, max(0.001, left_s))
                told, writes = writes, []
                for write in told:
                    write.committed()
            except Exception as error:
                late = [write for write in writes if not _locked(error) or write.deadline <= time.monotonic()]
                writes = [write for write in writes if write not in late]
                for write in late:
                    write.done.set_exception(error)

    def _write_together(self, writes: Sequence["Write"], wait_s: float) -> None:
        if self._write_connection is None:
            self._write_connection = self._connect()
        db = self._write_connection
        db.execute(f"PRAGMA busy_timeout = {int(wait_s * 1000) + 1}")
        db.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                write.run(db)
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    async def _read(self, sql: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        def run() -> list[tuple[Any, ...]]:
            if self._read_connection is None:
                self._read_connection = self._connect()
            return self._read_connection.execute(sql, values).fetchall()

        return await self._in(self._reader, run)

    async def _read_some(self, sql: str, ids: Sequence[str]) -> list[tuple[Any, ...]]:
        """Rows by id, `MAX_VARIABLES` ids a query. `sql` ends with `IN `."""
        rows: list[tuple[Any, ...]] = []
        for first in range(0, len(ids), MAX_VARIABLES):
            part = ids[first : first + MAX_VARIABLES]
            rows += await self._read(f"{sql} ({','.join('?' * len(part))})", part)
        return rows

    async def _in(self, executor: ThreadPoolExecutor, run: Callable[[], T]) -> T:
        with _outages():
            return await asyncio.get_running_loop().run_in_executor(executor, run)


def _locked(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


@contextlib.contextmanager
def _outages() -> Iterator[None]:
    """Turn what will pass into `Unavailable`."""
    try:
        yield
    except sqlite3.OperationalError as error:
        hint = "" if _locked(error) else "; check its disk's free space and rights"
        raise Unavailable(f"the record store cannot answer: {error}{hint}") from error


def _schema(collections: Sequence[Collection]) -> list[str]:
    statements = [part for part in JOURNAL_SCHEMA.split(";") if part.strip()]
    for c in collections:
        statements.append(_table(c.name))
        statements.append(f"CREATE INDEX IF NOT EXISTS {c.name}_pending ON {c.name} (pending) WHERE pending = 1")
        statements += [f"CREATE UNIQUE INDEX IF NOT EXISTS {c.name}_u_{f} ON {c.name} ({_field(f)})" for f in c.unique]
        statements += [
            f"CREATE INDEX IF NOT EXISTS {c.name}_l_{f} ON {c.name} ({_field(f)}, {_field('created_at')}, id)"
            for f in c.listed_by
        ]
    return statements


def _table(name: str) -> str:
    # With rowids, so that what waits longest is found first, and a document of a few KB takes no page of its own.
    return (
        f"CREATE TABLE IF NOT EXISTS {name} (id TEXT PRIMARY KEY NOT NULL, version INTEGER NOT NULL, "
        "pending INTEGER NOT NULL, outbox TEXT NOT NULL, doc TEXT NOT NULL)"
    )


def _give_outbox_its_column(db: sqlite3.Connection, name: str) -> None:
    """Bring a table of the first files, which had version and outbox inside the document, to the present form."""
    columns = {row[1] for row in db.execute(f"PRAGMA table_info({name})")}
    if not columns or "outbox" in columns:
        return
    db.execute(_table(f"{name}_new"))
    db.execute(
        f"INSERT INTO {name}_new SELECT id, version, pending, doc -> '$.outbox', "  # noqa: S608
        f"json_remove(doc, '$.outbox', '$.version') FROM {name}"
    )
    db.execute(f"DROP TABLE {name}")
    db.execute(f"ALTER TABLE {name}_new RENAME TO {name}")


def _field(name: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        raise ValueError(f"not a field name: {name!r}")
    return "id" if name == "_id" else f"doc ->> '$.{name}'"


def _row(document: Document) -> tuple[int, int, str, str]:
    """Version, pending, outbox and the rest. SQLite's JSON functions read text; bytes would be stored as a blob."""
    rest = {name: value for name, value in document.items() if name not in ("version", "outbox")}
    outbox = orjson.dumps(document["outbox"]).decode()
    return document["version"], int(bool(document["outbox"])), outbox, orjson.dumps(rest).decode()


def _decode(version: int, outbox: str, rest: str) -> Document:
    return {**orjson.loads(rest), "version": version, "outbox": orjson.loads(outbox)}


def _insert(db: sqlite3.Connection, collection: Collection, document: Document) -> None:
    sql = f"INSERT INTO {collection.name} (version, pending, outbox, doc, id) VALUES (?, ?, ?, ?, ?)"  # noqa: S608
    row = (*_row(document), document["_id"])
    _unique(lambda: db.execute(sql, row))


def _replace(db: sqlite3.Connection, collection: Collection, document: Document, version: int) -> bool:
    sql = f"UPDATE {collection.name} SET version = ?, pending = ?, outbox = ?, doc = ? WHERE id = ? AND version = ?"  # noqa: S608
    row = (*_row(document), document["_id"], version)
    return bool(_unique(lambda: db.execute(sql, row)).rowcount == 1)


def _put_all(
    db: sqlite3.Connection, collection: Collection, changes: Sequence[tuple[Document, int | None]]
) -> list[bool]:
    """Insert what has no version, and replace what still has its version; which were written."""
    insert = (
        f"INSERT INTO {collection.name} (version, pending, outbox, doc, id) VALUES {{rows}} "  # noqa: S608
        "ON CONFLICT DO NOTHING RETURNING id"
    )
    replace = (
        f"UPDATE OR IGNORE {collection.name} SET version = column1, pending = column2, outbox = column3, doc = column4 "  # noqa: S608
        "FROM (VALUES {rows}) WHERE id = column5 AND version = column6 RETURNING id"
    )
    new = [(*_row(document), document["_id"]) for document, version in changes if version is None]
    changed = [(*_row(document), document["_id"], version) for document, version in changes if version is not None]
    inserted = {id for (id,) in _at_once(db, insert, new)}
    replaced = {id for (id,) in _at_once(db, replace, changed)}
    return [document["_id"] in (inserted if version is None else replaced) for document, version in changes]


def _settle_whole(db: sqlite3.Connection, name: str, settled: Sequence[tuple[str, Sequence[str]]]) -> set[str]:
    """Empty, without reading them, the outboxes that end with the last of these events; the ids of those documents.

    Events are added at an outbox's end only and published from its beginning, so there is no other in it.
    """
    sql = (
        f"UPDATE {name} SET version = version + 1, pending = 0, outbox = '[]' FROM (VALUES {{rows}}) "  # noqa: S608
        "WHERE id = column1 AND outbox ->> '$[#-1].headers.ce_id' = column2 RETURNING id"
    )
    rows = [(id, event_ids[-1]) for id, event_ids in settled if event_ids]
    return {id for (id,) in _at_once(db, sql, rows)}


def _settle(db: sqlite3.Connection, name: str, id: str, event_ids: frozenset[str]) -> None:
    row = db.execute(f"SELECT outbox FROM {name} WHERE id = ?", (id,)).fetchone()  # noqa: S608
    if row is None:
        return
    left = [entry for entry in orjson.loads(row[0]) if entry["headers"]["ce_id"] not in event_ids]
    # The version moves, so a concurrent compare-and-set cannot bring the published events back.
    sql = f"UPDATE {name} SET version = version + 1, pending = ?, outbox = ? WHERE id = ?"  # noqa: S608
    db.execute(sql, (int(bool(left)), orjson.dumps(left).decode(), id))


def _at_once(db: sqlite3.Connection, sql: str, rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Run a statement over many `{rows}`, `MAX_ROWS` at a time; what it returns.

    SQLite works without Python's global lock, but has to win it back after each statement and each row of `executemany`, which takes
    5 ms while another thread computes.
    """
    found: list[tuple[Any, ...]] = []
    for first in range(0, len(rows), MAX_ROWS):
        part = rows[first : first + MAX_ROWS]
        marks = f"({','.join('?' * len(part[0]))})"
        statement = sql.format(rows=",".join([marks] * len(part)))
        found += db.execute(statement, list(itertools.chain.from_iterable(part))).fetchall()
    return found


def _unique(write: Callable[[], sqlite3.Cursor]) -> sqlite3.Cursor:
    try:
        return write()
    except sqlite3.IntegrityError as error:
        match = UNIQUE_FAILED.search(str(error))
        if match is None:
            raise
        index, column = match.groups()
        raise DuplicateRecord(index.rpartition("_u_")[2] if index else column.rpartition(".")[2]) from error
