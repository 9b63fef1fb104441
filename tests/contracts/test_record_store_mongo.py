"""What only the record store on MongoDB has to do: indexes that are there, durable writes, and answers in time when nobody answers it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import monitoring

from mini_studio.errors import Unavailable
from mini_studio.records.mongo import MongoStore
from tests.contracts.test_record_store import THINGS, thing
from tests.fakes.broker import free_port
from tests.fakes.real_mongo import RealMongo, own_mongo

REFUSED_S = 2.5

pytestmark = pytest.mark.real


@pytest.fixture
async def store(mongo_url: str, mongo_database: str) -> AsyncIterator[MongoStore]:
    store = MongoStore(mongo_url, mongo_database, [THINGS])
    await store.prepare()
    yield store
    await store.aclose()


@pytest.fixture(scope="module")
def stoppable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMongo]:
    with own_mongo(tmp_path_factory.mktemp("own-mongo")) as mongo:
        yield mongo


@pytest.fixture
async def on_stoppable(stoppable: RealMongo) -> AsyncIterator[MongoStore]:
    store = MongoStore(stoppable.url, "stoppable", [THINGS])
    await store.prepare()
    await store.clear(THINGS)
    yield store
    await store.aclose()


async def refused(store: MongoStore, *, at_once: int = 50) -> None:
    """Whoever asks is refused soon; nobody waits for those before him."""
    began = time.monotonic()
    asked = [store.get(THINGS, "a") if n % 2 else store.insert(THINGS, thing(f"q{n}")) for n in range(at_once)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers} == {Unavailable}
    assert time.monotonic() - began < REFUSED_S + 0.5  # which a busy machine takes


async def test_a_database_without_its_indexes_is_refused_until_they_are_made(
    mongo_url: str, mongo_database: str
) -> None:
    store = MongoStore(mongo_url, mongo_database, [THINGS])
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"no index \w+ of things.*mini-studio prepare"):
            await store.get(THINGS, "a")
    other = MongoStore(mongo_url, mongo_database, [THINGS])
    await other.prepare()
    await other.prepare()
    assert await store.get(THINGS, "a") is None
    for each in (store, other):
        await each.aclose()


async def test_an_index_that_is_not_unique_is_not_the_one(mongo_url: str, mongo_database: str) -> None:
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(mongo_url)
    await client[mongo_database].event_journal.create_index([("event_id", 1)], name="event_id")
    client.close()
    store = MongoStore(mongo_url, mongo_database, [])
    with pytest.raises(Unavailable, match="no index event_id of event_journal as it should be"):
        await store.journal_end()
    await store.aclose()


class Commands(monitoring.CommandListener):
    """What a client sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        self.sent.append((event.command_name, dict(event.command)))

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


async def test_every_write_is_in_the_journals_of_a_majority(
    mongo_url: str, mongo_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the URL says otherwise. Nothing is read from a secondary, and the journal's readers see what cannot be rolled back."""
    commands = Commands()
    monkeypatch.setattr(monitoring, "_LISTENERS", monitoring._Listeners([commands], [], [], [], []))
    store = MongoStore(f"{mongo_url}/?w=0&readPreference=secondary", mongo_database, [THINGS])
    await store.prepare()
    await store.insert(THINGS, thing("a", events=2))
    await store.replace(THINGS, {**thing("a", events=2), "version": 2}, 1)
    await store.put_all(THINGS, [(thing("b"), None), ({**thing("a", events=2), "version": 3}, 2)])
    await store.settle([(THINGS, "a", ["a-0"])])
    await store.settle([(THINGS, "a", ["a-1"])])
    await store.journal(thing("a", events=2)["outbox"])
    assert len(await store.read_journal()) == await store.journal_end() == 2
    await store.clear(THINGS)
    await store.aclose()

    writes = [command for name, command in commands.sent if name in ("insert", "update", "delete")]
    reads = [command for name, command in commands.sent if name == "find"]
    assert len(writes) == 9
    assert all(command["writeConcern"] == {"w": "majority", "j": True} for command in writes)
    assert {name for name, _ in commands.sent} <= {
        "insert", "update", "delete", "find", "createIndexes", "listIndexes", "endSessions",
    }  # fmt: skip
    assert not any("startTransaction" in command for _, command in commands.sent)
    modes = [command.get("$readPreference", {"mode": "primary"})["mode"] for command in reads]
    assert not {"secondary", "nearest"} & set(modes)
    levels = [(c["find"], c.get("readConcern", {}).get("level", "local")) for c in reads if "limit" in c]
    assert levels.count(("event_journal", "majority")) == 2, "its entries, and its end"


async def test_a_document_that_grows_too_large_waits_for_its_outbox(store: MongoStore) -> None:
    await store.insert(THINGS, thing("a"))
    grown = {**thing("a"), "version": 2, "told": "x" * 17_000_000}
    with pytest.raises(Unavailable, match="until its outbox is published"):
        await store.replace(THINGS, grown, 1)
    assert await store.get(THINGS, "a") == thing("a")


class Far(MongoStore):
    """A database that takes long to answer."""

    @contextlib.asynccontextmanager
    async def _exchange(self) -> AsyncIterator[Any]:
        async with super()._exchange() as db:
            await asyncio.sleep(0.5)
            yield db


async def test_a_long_read_takes_as_many_exchanges_as_it_needs(
    store: MongoStore, mongo_url: str, mongo_database: str
) -> None:
    """The limit is for the answer to one question, not for a journal of any length."""
    await store.put_all(THINGS, [(thing(f"{n:05}"), None) for n in range(3000)])
    far = Far(mongo_url, mongo_database, [THINGS], timeout_s=2)
    began = time.monotonic()
    assert [d["_id"] for d in await far.scan(THINGS, limit=2900)] == [f"{n:05}" for n in range(2900)]
    assert time.monotonic() - began > 2
    await far.aclose()


async def test_a_database_that_is_not_there_is_unavailable_soon() -> None:
    store = MongoStore(f"mongodb://127.0.0.1:{free_port()}", "nothing", [THINGS])
    await refused(store)
    with pytest.raises(Unavailable, match="refused"):
        await asyncio.wait_for(store.prepare(), 10)
    await store.aclose()


async def test_a_paused_database_is_unavailable_soon_and_then_goes_on(
    stoppable: RealMongo, on_stoppable: MongoStore
) -> None:
    await on_stoppable.insert(THINGS, thing("a"))
    stoppable.pause()
    try:
        await refused(on_stoppable)
        await refused(on_stoppable)
        fresh = MongoStore(stoppable.url, "stoppable", [THINGS])
        await refused(fresh)
        await fresh.aclose()
    finally:
        stoppable.resume()
    began = time.monotonic()
    while True:
        try:
            assert await on_stoppable.get(THINGS, "a") == thing("a")
            break
        except Unavailable:
            assert time.monotonic() - began < 10


async def test_a_killed_database_loses_nothing_acknowledged(
    stoppable: RealMongo, on_stoppable: MongoStore, tmp_path: Path
) -> None:
    acknowledged: list[str] = []
    over = asyncio.Event()

    async def write(name: str) -> None:
        """Each waits for its answer; what was refused may be there or not."""
        number = 0
        while not over.is_set():
            number += 1
            try:
                await on_stoppable.insert(THINGS, thing(f"{name}-{number}"))
            except Unavailable:
                await asyncio.sleep(0.05)
            else:
                acknowledged.append(f"{name}-{number}")

    writers = [asyncio.create_task(write(name)) for name in "abcd"]
    for _ in range(3):
        before = len(acknowledged)
        while len(acknowledged) < before + 50:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(stoppable.kill)
        await refused(on_stoppable, at_once=4)
        await asyncio.to_thread(stoppable.start_again)
    over.set()
    await asyncio.gather(*writers)
    assert set(await on_stoppable.get_all(THINGS, acknowledged)) == set(acknowledged)
