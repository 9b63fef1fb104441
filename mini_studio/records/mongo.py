"""The record store on MongoDB, without transactions: every write is of one document, acknowledged by a majority's journals.

**The journal.** Its positions are the entries' `_id`s, without gaps, and nobody allots them: a writer inserts behind the last
entry it knows of, in order, and the unique `_id` lets one of several win; the others look where the end is now and go on from
there. So an entry is inserted only when the one before it is there to stay. Whatever is killed or frozen, between whichever
steps, what stands in the journal is whole up to its end and grows at its end alone: a reader behind a position misses nothing,
and no lease has to run out. It also keeps the order of two relays that journal the same outbox: either inserts an event only
when the one before it is there. Why no counter and no lease: docs/decisions/0006-*.

It is the only module that imports motor; PyMongo's own asyncio client is motor's successor.
"""

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import pymongo
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import IndexModel, InsertOne, ReadPreference, ReplaceOne, UpdateOne, WriteConcern
from pymongo.errors import BulkWriteError, DocumentTooLarge, DuplicateKeyError, PyMongoError
from pymongo.read_concern import ReadConcern

from mini_studio.errors import Unavailable
from mini_studio.records.store import Collection, Document, DuplicateRecord, JournalEntry, in_turns

JOURNAL = "event_journal"
PENDING = "_pending"
"""Only in a document with events in its outbox: since when the first of them waits. Its index is as small as the backlog."""
BATCH = 500
"""Documents in one exchange with the database: few enough to be answered in time."""
GRACE_S = 0.3
"""What the driver has over its own timeout to say what was wrong, before the caller is told that there is no answer."""
TURN_S = 10.0
"""How long a journal's writer goes on without its turn while others have theirs; only relays wait for it."""
PAUSE_MIN_S, PAUSE_MAX_S = 0.005, 0.2
CONNECTIONS = 50
SETTLE_TRIES = 50
DUPLICATE = 11000
DUPLICATE_INDEX = re.compile(r"index: (\S+)")


class MongoStore:
    """Implements `RecordStore`. Reads are of the primary; `timeout_s` is for each exchange with it, all waiting included."""

    def __init__(self, url: str, database: str, collections: Sequence[Collection], *, timeout_s: float = 2.0) -> None:
        self._url = url
        self._name = database
        self._timeout_s = timeout_s
        self._indexes = {c.name: _indexes(c) for c in collections} | {JOURNAL: _JOURNAL_INDEXES}
        self._client: Any = None
        self._checked = False
        self._end = 0
        """Position of the last entry of the journal that is known here: acknowledged by a majority, so no failover takes it back."""

    async def prepare(self) -> None:
        """Takes as long as an index takes to be made of what is there."""
        with _outages():
            for name, indexes in self._indexes.items():
                await self._database[name].create_indexes(indexes)

    async def insert(self, collection: Collection, document: Document) -> None:
        async with self._exchange() as db:
            with _unique():
                await db[collection.name].insert_one(_encode(document))

    async def get(self, collection: Collection, id: str) -> Document | None:
        async with self._exchange() as db:
            found = await db[collection.name].find_one({"_id": id})
        return None if found is None else _decode(found)

    async def replace(self, collection: Collection, document: Document, version: int) -> bool:
        async with self._exchange() as db:
            with _unique():
                where = {"_id": document["_id"], "version": version}
                result = await db[collection.name].replace_one(where, _encode(document))
        return bool(result.matched_count)

    async def get_all(self, collection: Collection, ids: Sequence[str]) -> dict[str, Document]:
        found = await self._read_some(collection.name, "_id", ids)
        return {document["_id"]: _decode(document) for document in found}

    async def put_all(self, collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        """One that was written, and changed again before it could be seen, counts as not written: its writer looks once more."""
        written: list[bool] = []
        for first in range(0, len(changes), BATCH):
            written += await self._put(collection, changes[first : first + BATCH])
        return written

    async def _put(self, collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        requests = [_write(document, version) for document, version in changes]
        refused: set[int] = set()
        async with self._exchange() as db:
            try:
                matched = (await db[collection.name].bulk_write(requests, ordered=False)).matched_count
            except BulkWriteError as error:
                refused = {each["index"] for each in _duplicates(error)}
                matched = error.details["nMatched"]
        written = [number not in refused for number in range(len(changes))]
        replaced = [number for number, (_, version) in enumerate(changes) if version is not None and written[number]]
        if matched != len(replaced):  # the answer says how many, not which
            stored = await self.get_all(collection, [changes[number][0]["_id"] for number in replaced])
            for number in replaced:
                document = changes[number][0]
                written[number] = stored.get(document["_id"]) == document
        return written

    async def find(
        self,
        collection: Collection,
        where: Mapping[str, Any],
        *,
        limit: int,
        after: tuple[str, str] | None = None,
        newest_first: bool = True,
    ) -> list[Document]:
        order, behind, from_ = (-1, "$lt", "$lte") if newest_first else (1, "$gt", "$gte")
        filter = dict(where)
        if after is not None:
            at, id = after
            # The first condition is the index's bound, so a page costs the same wherever it begins.
            filter |= {"created_at": {from_: at}, "$or": [{"created_at": {behind: at}}, {"_id": {behind: id}}]}
        found = await self._read(collection.name, filter, limit=limit, sort=[("created_at", order), ("_id", order)])
        return [_decode(document) for document in found]

    async def scan(self, collection: Collection, *, after: str = "", limit: int) -> list[Document]:
        found = await self._read(collection.name, {"_id": {"$gt": after}}, limit=limit, sort=[("_id", 1)])
        return [_decode(document) for document in found]

    async def pending(self, collections: Sequence[Collection], limit: int) -> list[tuple[Collection, Document]]:
        waiting, part = {PENDING: {"$gte": ""}}, {"outbox": 1}
        each = [await self._read(c.name, waiting, limit=limit, sort=[(PENDING, 1)], part=part) for c in collections]
        return in_turns(collections, each)[:limit]

    async def settle(self, settled: Sequence[tuple[Collection, str, Sequence[str]]]) -> None:
        by_name: dict[str, list[tuple[str, Sequence[str]]]] = {}
        for collection, id, event_ids in settled:
            if event_ids:
                by_name.setdefault(collection.name, []).append((id, event_ids))
        for name, documents in by_name.items():
            for first in range(0, len(documents), BATCH):
                await self._settle(name, dict(documents[first : first + BATCH]))

    async def _settle(self, name: str, settled: Mapping[str, Sequence[str]]) -> None:
        """Empty the outboxes that hold just these events; the others one by one."""
        async with self._exchange() as db:
            requests = [_emptying(id, event_ids) for id, event_ids in settled.items()]
            emptied = (await db[name].bulk_write(requests, ordered=False)).matched_count
        if emptied < len(settled):
            for document in await self._read_some(name, "_id", list(settled)):
                if document["outbox"]:
                    await self._settle_part(name, document["_id"], frozenset(settled[document["_id"]]))

    async def _settle_part(self, name: str, id: str, event_ids: frozenset[str]) -> None:
        """The version moves, so a concurrent compare-and-set cannot bring the published events back."""
        for _ in range(SETTLE_TRIES):
            async with self._exchange() as db:
                found = await db[name].find_one({"_id": id}, {"outbox": 1, "version": 1})
                if found is None:
                    return
                left = [entry for entry in found["outbox"] if entry["headers"]["ce_id"] not in event_ids]
                changed: dict[str, Any] = {"outbox": left, "version": found["version"] + 1, **_pending(left)}
                update: dict[str, Any] = {"$set": changed}
                if not left:
                    update["$unset"] = {PENDING: ""}
                where = {"_id": id, "version": found["version"]}
                if (await db[name].update_one(where, update)).matched_count:
                    return
        raise Unavailable(f"{name}/{id} is being changed by too many at once")

    async def clear(self, collection: Collection) -> None:
        while found := await self._read(collection.name, {}, limit=BATCH, part={"_id": 1}):
            async with self._exchange() as db:
                await db[collection.name].delete_many({"_id": {"$in": [document["_id"] for document in found]}})

    async def journal(self, stored: Sequence[dict[str, Any]]) -> None:
        told = {entry["headers"]["ce_id"]: entry for entry in stored}
        known = {found["event_id"] for found in await self._read_some(JOURNAL, "event_id", list(told), {"event_id": 1})}
        lacking = [entry for id, entry in told.items() if id not in known]
        for first in range(0, len(lacking), BATCH):
            await self._append(lacking[first : first + BATCH])

    async def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Insert behind the end, wherever that is by now; raises `Unavailable` when it is never its turn."""
        clock = asyncio.get_running_loop().time
        deadline, pause_s = clock() + TURN_S, PAUSE_MIN_S
        while (taken := await self._insert_behind(self._end, entries)) is not None:
            done = taken["index"]
            self._end += done
            if _index_of(taken) != "_id_":  # another relay was faster with this very event
                entries = entries[done + 1 :]
                continue
            entries = entries[done:]
            if done:
                deadline, pause_s = clock() + TURN_S, PAUSE_MIN_S
            elif clock() > deadline:
                raise Unavailable("the journal is being written by too many at once")
            await asyncio.sleep(random.uniform(0, pause_s))
            pause_s = min(pause_s * 2, PAUSE_MAX_S)
            self._end = await self.journal_end()
        self._end += len(entries)

    async def _insert_behind(self, position: int, entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Insert them in order; what stood against the first that could not be, if one could not."""
        if not entries:
            return None
        rows = [_journalled(position + n, entry) for n, entry in enumerate(entries, start=1)]
        async with self._exchange() as db:
            try:
                await db[JOURNAL].insert_many(rows, ordered=True)
            except BulkWriteError as error:
                return _duplicates(error)[0]
        return None

    async def read_journal(self, *, after: int = 0, limit: int = 1000, key: str | None = None) -> list[JournalEntry]:
        where: dict[str, Any] = {"_id": {"$gt": after}} if key is None else {"key": key, "_id": {"$gt": after}}
        found = await self._read(JOURNAL, where, limit=limit, sort=[("_id", 1)], majority=True)
        return [JournalEntry(row["_id"], row["event_id"], row["stored"]) for row in found]

    async def journal_end(self) -> int:
        found = await self._read(JOURNAL, {}, limit=1, sort=[("_id", -1)], part={"_id": 1}, majority=True)
        return found[0]["_id"] if found else 0

    async def journalled(self, event_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        found = await self._read_some(JOURNAL, "event_id", event_ids)
        return {row["event_id"]: row["stored"] for row in found}

    async def aclose(self) -> None:
        if self._client is not None:
            self._client.close()

    async def _read_some(
        self, name: str, field: str, values: Sequence[str], part: Mapping[str, int] | None = None
    ) -> list[Document]:
        found: list[Document] = []
        for first in range(0, len(values), BATCH):
            where = {field: {"$in": list(values[first : first + BATCH])}}
            found += await self._read(name, where, limit=BATCH, part=part)
        return found

    async def _read(
        self,
        name: str,
        where: Mapping[str, Any],
        *,
        limit: int,
        sort: Sequence[tuple[str, int]] = (),
        part: Mapping[str, int] | None = None,
        majority: bool = False,
    ) -> list[Document]:
        """In as many exchanges as it takes. `majority`: only what no failover takes back."""
        found: list[Document] = []
        cursor: Any = None
        while True:
            async with self._exchange() as db:
                if cursor is None:
                    concern = ReadConcern("majority" if majority else "local")
                    collection = db[name].with_options(read_concern=concern)
                    cursor = collection.find(where, part, sort=list(sort) or None, limit=limit, batch_size=BATCH)
                page = await cursor.to_list(BATCH)
            found += page
            if len(page) < BATCH or len(found) == limit:
                return found

    @contextlib.asynccontextmanager
    async def _exchange(self) -> AsyncIterator[Any]:
        """The database, for one exchange with it. What takes too long, or will pass, is `Unavailable`.

        The driver counts from here, not from when one of its threads is free: a thread leaves at once what nobody waits for any more.
        """
        with _outages(), pymongo.timeout(self._timeout_s):
            async with asyncio.timeout(self._timeout_s + GRACE_S):
                if not self._checked:
                    await self._check()
                yield self._database

    async def _check(self) -> None:
        """A query without its index would be a slow day, and a missing unique one two owners of a name."""
        for name, indexes in self._indexes.items():
            found = await self._database[name].index_information()
            for index in (each.document for each in indexes):
                there = found.get(index["name"], {})
                if (there.get("key"), there.get("unique", False)) != (
                    list(index["key"].items()),
                    index.get("unique", False),
                ):
                    raise Unavailable(
                        f"the record store has no index {index['name']} of {name} as it should be: run `mini-studio prepare`"
                    )
        self._checked = True

    @property
    def _database(self) -> Any:
        if self._client is None:
            wait_ms = int(self._timeout_s * 1000)
            self._client = AsyncIOMotorClient(
                self._url, appname="mini-studio", maxPoolSize=CONNECTIONS, retryReads=True, retryWrites=True,
                serverSelectionTimeoutMS=wait_ms, connectTimeoutMS=wait_ms,
            )  # fmt: skip
        return self._client.get_database(
            self._name, read_preference=ReadPreference.PRIMARY, write_concern=WriteConcern("majority", j=True)
        )


def _indexes(collection: Collection) -> list[IndexModel]:
    return [
        IndexModel([(PENDING, 1)], name="pending", sparse=True),
        *(IndexModel([(field, 1)], name=f"u_{field}", unique=True, sparse=True) for field in collection.unique),
        *(IndexModel([(f, 1), ("created_at", 1), ("_id", 1)], name=f"l_{f}") for f in collection.listed_by),
    ]


_JOURNAL_INDEXES = [
    IndexModel([("event_id", 1)], name="event_id", unique=True),
    IndexModel([("key", 1), ("_id", 1)], name="key"),
]


def _pending(outbox: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {PENDING: outbox[0]["headers"].get("ce_time", "")} if outbox else {}


def _encode(document: Document) -> Document:
    return {**document, **_pending(document["outbox"])}


def _decode(stored: Document) -> Document:
    stored.pop(PENDING, None)
    return stored


def _write(document: Document, version: int | None) -> InsertOne[Document] | ReplaceOne[Document]:
    if version is None:
        return InsertOne(_encode(document))
    return ReplaceOne({"_id": document["_id"], "version": version}, _encode(document))


def _emptying(id: str, event_ids: Sequence[str]) -> UpdateOne:
    """Empty the outbox if it holds these events and no other.

    Events are added at an outbox's end only and taken from its beginning: as many, with the same last one, are the same.
    """
    where = {
        "_id": id,
        "outbox": {"$size": len(event_ids)},
        f"outbox.{len(event_ids) - 1}.headers.ce_id": event_ids[-1],
    }
    return UpdateOne(where, {"$set": {"outbox": []}, "$unset": {PENDING: ""}, "$inc": {"version": 1}})


def _journalled(position: int, entry: dict[str, Any]) -> Document:
    return {"_id": position, "event_id": entry["headers"]["ce_id"], "key": entry["key"], "stored": entry}


def _index_of(error: Mapping[str, Any]) -> str:
    """The name of the unique index that stood against a write."""
    match = DUPLICATE_INDEX.search(error["errmsg"])
    return match.group(1) if match else ""


def _duplicates(error: BulkWriteError) -> list[dict[str, Any]]:
    """The writes that a unique index stood against. Raises `Unavailable` when anything else was wrong as well."""
    refused: list[dict[str, Any]] = error.details["writeErrors"]
    others = [*error.details["writeConcernErrors"], *(each for each in refused if each["code"] != DUPLICATE)]
    if others:
        raise Unavailable(f"the record store cannot answer: {others[0]['errmsg'][:300]}") from error
    return refused


@contextlib.contextmanager
def _unique() -> Iterator[None]:
    try:
        yield
    except DuplicateKeyError as error:
        index = _index_of(error.details or {"errmsg": str(error)})
        raise DuplicateRecord("id" if index == "_id_" else index.removeprefix("u_")) from error


@contextlib.contextmanager
def _outages() -> Iterator[None]:
    """Turn what will pass into `Unavailable`."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable("the record store cannot answer: MongoDB keeps silent") from error
    except DocumentTooLarge as error:
        raise Unavailable(f"the record store cannot take more until its outbox is published: {error}") from error
    except PyMongoError as error:
        # Behind the reason the driver adds its timeouts and its view of the cluster.
        reason = re.split(r" \(configured timeouts|, Timeout: ", str(error))[0]
        raise Unavailable(f"the record store cannot answer: {reason[:300]}") from error
