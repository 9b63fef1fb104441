"""The record store contract, run on every adapter."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from mini_studio.records.mongo import MongoStore
from mini_studio.records.sqlite import SqliteStore
from mini_studio.records.store import Collection, Document, DuplicateRecord, RecordStore

THINGS = Collection("things", unique=("name",), listed_by=("client_code",))
OTHERS = Collection("others")
COLLECTIONS = (THINGS, OTHERS)

Open = Callable[[], RecordStore]


@pytest.fixture(params=["sqlite", pytest.param("mongo", marks=pytest.mark.real)])
async def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Open]:
    """Opens the same store once more, as another process would."""
    name = request.getfixturevalue("mongo_database") if request.param == "mongo" else ""
    async with AsyncExitStack() as stack:

        def open_one() -> RecordStore:
            store: SqliteStore | MongoStore
            if request.param == "mongo":
                store = MongoStore(request.getfixturevalue("mongo_url"), name, COLLECTIONS)
            else:
                store = SqliteStore(tmp_path / "records.sqlite", COLLECTIONS)
            stack.push_async_callback(store.aclose)
            return store

        yield open_one


@pytest.fixture
async def store(open_store: Open) -> RecordStore:
    store = open_store()
    await store.prepare()
    return store


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


async def test_a_clients_documents_of_a_time_are_read_by_its_bounds(store: RecordStore) -> None:
    """Oldest first from a time on, newest first from before a time on; a time with an empty id stands in front of all of that time."""
    for n in range(24):
        for client in ("acme", "other", ""):
            await store.insert(THINGS, thing(f"{client}{n:02}", client=client, at=f"2026-01-01T{n // 2:02}:00"))
    for client in ("acme", ""):
        mine = {"client_code": client}
        later = await store.find(THINGS, mine, limit=5, after=("2026-01-01T05:00", ""), newest_first=False)
        assert [document["_id"] for document in later] == [f"{client}{n:02}" for n in range(10, 15)]
        before = await store.find(THINGS, mine, limit=3, after=("2026-01-01T05:00", ""))
        assert [document["_id"] for document in before] == [f"{client}{n:02}" for n in (9, 8, 7)]
        rest = await store.find(THINGS, mine, limit=500, after=("2026-01-01T11:00", ""), newest_first=False)
        assert [document["_id"] for document in rest] == [f"{client}22", f"{client}23"]


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


async def test_pending_collections_take_turns(store: RecordStore) -> None:
    for n in range(10):
        await store.insert(THINGS, thing(f"a{n}", events=1))
    await store.insert(OTHERS, thing("b", events=1))
    found = await store.pending([THINGS, OTHERS], 4)
    assert [document["_id"] for _, document in found] == ["a0", "b", "a1", "a2"], "and the oldest first"


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


async def test_a_second_process_sees_and_fences(store: RecordStore, open_store: Open) -> None:
    other = open_store()
    await store.insert(THINGS, thing("a"))
    assert await other.replace(THINGS, {**thing("a"), "version": 2}, 1)
    assert not await store.replace(THINGS, {**thing("a"), "version": 2}, 1)


async def test_one_that_fails_leaves_those_beside_it_as_they_are(store: RecordStore) -> None:
    await store.insert(THINGS, thing("taken"))
    writes = [store.insert(THINGS, thing("taken" if n % 3 == 0 else f"t{n:03}")) for n in range(90)]
    answers = await asyncio.gather(*writes, return_exceptions=True)
    assert [isinstance(answer, DuplicateRecord) for answer in answers] == [n % 3 == 0 for n in range(90)]
    assert len(await store.find(THINGS, {}, limit=1000)) == 61


async def test_fifty_claim_and_one_wins_each_time(store: RecordStore, open_store: Open) -> None:
    """Half of them from another process, by an insert under a unique name and by a compare-and-set of a queued one."""
    other = open_store()
    stores = [store, other] * 25
    for round in range(20):
        inserts = [s.insert(THINGS, thing(f"{round}-{n}", name=f"job-{round}")) for n, s in enumerate(stores)]
        answers = await asyncio.gather(*inserts, return_exceptions=True)
        assert answers.count(None) == 1
        assert [a.field for a in answers if isinstance(a, DuplicateRecord)] == ["name"] * 49
        (queued,) = await store.find(THINGS, {"name": f"job-{round}"}, limit=2)
        claims = [{**queued, "version": 2, "client_code": f"claimer-{n}"} for n in range(50)]
        won = await asyncio.gather(*(s.replace(THINGS, c, 1) for s, c in zip(stores, claims, strict=True)))
        assert won.count(True) == 1
        assert await other.get(THINGS, queued["_id"]) == claims[won.index(True)]


async def test_documents_without_a_unique_field_are_not_compared(store: RecordStore) -> None:
    nameless = [{name: value for name, value in thing(id).items() if name != "name"} for id in ("a", "b")]
    for document in nameless:
        await store.insert(THINGS, document)
    assert await store.scan(THINGS, limit=10) == nameless
    await store.insert(THINGS, thing("c"))
    assert not any(await store.put_all(THINGS, [({**nameless[0], "version": 2, "name": "c"}, 1)]))
    with pytest.raises(DuplicateRecord) as caught:
        await store.replace(THINGS, {**nameless[0], "version": 2, "name": "c"}, 1)
    assert caught.value.field == "name"


async def test_every_kind_of_value_comes_back(store: RecordStore) -> None:
    """Times are texts, and keep their microseconds."""
    values: list[Any] = [0, -1, 2**31, 2**53 + 1, 0.1, 1e300, 5.0, True, None, "", "\u2028\U0001f600", [[1], {}]]
    times = ["2026-01-01T00:00:00.000001Z", "2026-01-01T00:00:00.000002Z"]
    rich = {**thing("a", at=times[1]), "values": values, "map": {"a.b/c": 1, "with space": {}}}
    await store.insert(THINGS, rich)
    await store.insert(THINGS, thing("b", at=times[0]))
    found = await store.get(THINGS, "a")
    assert found == rich
    assert all(isinstance(came, type(went)) for came, went in zip(found["values"], values, strict=True))
    assert [d["_id"] for d in await store.find(THINGS, {"client_code": "acme"}, limit=2)] == ["a", "b"]


async def test_a_document_that_is_gone_is_not_replaced(store: RecordStore) -> None:
    gone = {**thing("a"), "version": 2}
    assert not await store.replace(THINGS, gone, 1)
    assert await store.put_all(THINGS, [(gone, 1), (thing("b"), None)]) == [False, True]
    assert await store.get(THINGS, "a") is None


async def test_a_clients_list_holds_nobody_elses(store: RecordStore) -> None:
    for n in range(30):
        await store.insert(THINGS, thing(f"t{n:02}", client=f"client{n % 3}"))
    pages = [await store.find(THINGS, {"client_code": f"client{n}"}, limit=100, newest_first=False) for n in range(3)]
    assert [[d["_id"] for d in page] for page in pages] == [[f"t{n:02}" for n in range(c, 30, 3)] for c in range(3)]
    assert await store.find(THINGS, {"client_code": "client"}, limit=100) == []


async def test_journals_of_many_writers_grow_at_their_end_alone(store: RecordStore, open_store: Open) -> None:
    """Two of them journal the same events, as two relays of one outbox do. Nobody who reads on misses one."""
    histories = [thing(f"h{n}", events=40)["outbox"] for n in range(4)]
    read: list[str] = []

    async def write(store: RecordStore, history: list[dict[str, Any]]) -> None:
        for first in range(0, len(history), 5):
            await store.journal(history[first : first + 8])

    async def follow(store: RecordStore) -> None:
        position = 0
        while len(read) < 160:
            for entry in await store.read_journal(after=position, limit=7):
                read.append(entry.event_id)
                position = entry.position

    writers = [write(open_store(), history) for history in histories for _ in range(2)]
    await asyncio.wait_for(asyncio.gather(follow(store), *writers), 60)
    assert [entry.event_id for entry in await store.read_journal(limit=200)] == read
    for number, history in enumerate(histories):
        of_one = [id for id in read if id.startswith(f"h{number}-")]
        assert of_one == [entry["headers"]["ce_id"] for entry in history]
