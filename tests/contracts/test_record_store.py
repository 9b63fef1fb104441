"""The record store contract, run on every adapter."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from mini_studio.errors import Unavailable
from mini_studio.records.sqlite import SqliteStore
from mini_studio.records.store import Collection, Document, DuplicateRecord, RecordStore

THINGS = Collection("things", unique=("name",), listed_by=("client_code",))


@pytest.fixture(params=["sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RecordStore]:
    store = SqliteStore(tmp_path / "records.sqlite", [THINGS], busy_timeout_s=0.3)
    yield store
    await store.aclose()


def thing(
    id: str, *, name: str | None = None, client: str = "acme", at: str = "2026-01-01", events: int = 0
) -> Document:
    outbox = [{"topic": "t", "key": id, "headers": {"ce_id": f"{id}-{n}"}, "value": "{}"} for n in range(events)]
    return {"_id": id, "version": 1, "outbox": outbox, "name": name or id, "client_code": client, "created_at": at}


async def test_reads_what_it_wrote(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a"))
    assert await store.get(THINGS, "a") == thing("a")
    assert await store.get(THINGS, "b") is None


async def test_an_id_is_taken_once(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a"))
    with pytest.raises(DuplicateRecord) as caught:
        await store.insert(THINGS, thing("a", name="other"))
    assert caught.value.field == "id"


async def test_a_unique_field_is_taken_once(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a", name="same"))
    with pytest.raises(DuplicateRecord) as caught:
        await store.insert(THINGS, thing("b", name="same"))
    assert caught.value.field == "name"


async def test_compare_and_set_has_one_winner(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a"))
    for version in range(1, 20):
        writes = [store.replace(THINGS, {**thing("a"), "version": version + 1, "by": n}, version) for n in range(10)]
        assert sum(await asyncio.gather(*writes)) == 1


async def test_many_are_written_and_read_at_once(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a"))
    await store.insert(THINGS, thing("b"))
    changes: list[tuple[Document, int | None]] = [
        ({**thing("a"), "version": 2}, 1), ({**thing("b"), "version": 9}, 8), (thing("a"), None), (thing("c"), None),
        (thing("d", name="c"), None), *((thing(f"more{n:04}"), None) for n in range(1200)),
    ]  # fmt: skip
    written = await store.put_all(THINGS, changes)
    assert written == [True, False, False, True, False, *[True] * 1200]
    ids = [document["_id"] for document, _ in changes]
    found = await store.get_all(THINGS, [*ids, "nobody"])
    assert set(found) == set(ids) - {"d"}
    assert (found["a"]["version"], found["b"]["version"]) == (2, 1)
    await store.clear(THINGS)
    assert await store.find(THINGS, {}, limit=1) == []


async def test_lists_newest_first_by_keyset(store: RecordStore) -> None:
    for n in range(25):
        await store.insert(THINGS, thing(f"t{n:02}", at=f"2026-01-{1 + n // 2:02}"))
    await store.insert(THINGS, thing("z", client="other", at="2026-02-01"))
    seen: list[str] = []
    after: tuple[str, str] | None = None
    while page := await store.find(THINGS, {"client_code": "acme"}, limit=7, after=after):
        seen += [document["_id"] for document in page]
        after = (page[-1]["created_at"], page[-1]["_id"])
    assert seen == [f"t{n:02}" for n in reversed(range(25))]


async def test_all_documents_are_gone_through_by_id(store: RecordStore) -> None:
    ids = [f"t{n:02}" for n in range(25)]
    for id in reversed(ids):
        await store.insert(THINGS, thing(id))
    seen: list[str] = []
    while page := await store.scan(THINGS, after=seen[-1] if seen else "", limit=7):
        seen += [document["_id"] for document in page]
    assert seen == ids


async def test_outbox_is_pending_until_settled(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a", events=2))
    await store.insert(THINGS, thing("b"))
    (found,) = await store.pending([THINGS], 10)
    assert found[1]["_id"] == "a"
    await store.settle([(THINGS, "a", ["a-0"])])
    after = await store.get(THINGS, "a")
    assert after is not None
    assert [entry["headers"]["ce_id"] for entry in after["outbox"]] == ["a-1"]
    assert not await store.replace(THINGS, {**thing("a", events=2), "version": 2}, 1), (
        "a stale write brings nothing back"
    )
    await store.settle([(THINGS, "a", ["a-1"]), (THINGS, "gone", ["x"])])
    assert await store.pending([THINGS], 10) == []


async def test_what_was_added_since_it_was_read_stays_in_the_outbox(store: RecordStore) -> None:
    await store.insert(THINGS, thing("a", events=2))
    assert await store.replace(THINGS, {**thing("a", events=3), "version": 2}, 1)
    await store.settle([(THINGS, "a", ["a-0", "a-1"])])
    await store.settle([(THINGS, "a", ["a-0", "a-1"])])
    after = await store.get(THINGS, "a")
    assert after is not None
    assert [entry["headers"]["ce_id"] for entry in after["outbox"]] == ["a-2"]
    await store.settle([(THINGS, "a", ["of another time"])])
    await store.settle([(THINGS, "a", ["a-2"])])
    assert await store.pending([THINGS], 10) == []


async def test_settling_races_changes_and_neither_is_lost(store: RecordStore) -> None:
    """A change that read the outbox before it was settled loses, and so does a settling that knows less than there is."""
    await store.insert(THINGS, thing("a"))
    published: list[str] = []

    async def decide(number: int) -> None:
        while True:
            found = await store.get(THINGS, "a")
            assert found is not None
            entry = {"topic": "t", "key": "a", "headers": {"ce_id": f"e{number}"}, "value": "{}"}
            changed = {**found, "version": found["version"] + 1, "outbox": [*found["outbox"], entry]}
            if await store.replace(THINGS, changed, found["version"]):
                return

    async def relay() -> None:
        while len(published) < 60:
            for _, document in await store.pending([THINGS], 10):
                ids = [entry["headers"]["ce_id"] for entry in document["outbox"]]
                published.extend(ids)
                await store.settle([(THINGS, "a", ids)])

    async def decide_many(first: int) -> None:
        for number in range(first, first + 20):
            await decide(number)

    await asyncio.wait_for(asyncio.gather(relay(), *(decide_many(first) for first in (0, 20, 40))), 60)
    assert sorted(published) == sorted(f"e{number}" for number in range(60)), "each once"


async def test_pending_collections_take_turns(tmp_path: Path) -> None:
    others = Collection("others")
    store = SqliteStore(tmp_path / "records.sqlite", [THINGS, others])
    for n in range(10):
        await store.insert(THINGS, thing(f"a{n}", events=1))
    await store.insert(others, thing("b", events=1))
    found = await store.pending([THINGS, others], 4)
    assert [document["_id"] for _, document in found] == ["a0", "b", "a1", "a2"], "and the oldest first"
    await store.aclose()


async def test_journal_keeps_each_event_once_and_in_order(store: RecordStore) -> None:
    assert await store.journal_end() == 0
    entries = thing("a", events=3)["outbox"] + thing("b", events=1)["outbox"]
    await store.journal(entries)
    await store.journal(entries)
    read = await store.read_journal()
    assert [entry.stored for entry in read] == entries
    assert [entry.event_id for entry in await store.read_journal(after=read[1].position)] == ["a-2", "b-0"]
    assert [entry.event_id for entry in await store.read_journal(key="b")] == ["b-0"]
    assert await store.journal_end() == read[-1].position


async def test_the_journal_tells_events_by_id(store: RecordStore) -> None:
    first, second = thing("a", events=2)["outbox"]
    await store.journal([first, second])
    assert await store.journalled(["a-1", "forged"]) == {"a-1": second}
    assert await store.journalled([]) == {}


async def test_a_second_process_sees_and_fences(store: RecordStore, tmp_path: Path) -> None:
    other = SqliteStore(tmp_path / "records.sqlite", [THINGS])
    await store.insert(THINGS, thing("a"))
    assert await other.replace(THINGS, {**thing("a"), "version": 2}, 1)
    assert not await store.replace(THINGS, {**thing("a"), "version": 2}, 1)
    await other.aclose()


async def test_a_locked_store_is_unavailable_soon(store: RecordStore, tmp_path: Path) -> None:
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


async def test_one_that_fails_leaves_those_beside_it_as_they_are(store: RecordStore) -> None:
    await store.insert(THINGS, thing("taken"))
    writes = [store.insert(THINGS, thing("taken" if n % 3 == 0 else f"t{n:03}")) for n in range(90)]
    answers = await asyncio.gather(*writes, return_exceptions=True)
    assert [isinstance(answer, DuplicateRecord) for answer in answers] == [n % 3 == 0 for n in range(90)]
    assert len(await store.find(THINGS, {}, limit=1000)) == 61


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
