"""What both models stand on: the record store, the journal and the log as values, and time and ids that repeat."""

import asyncio
import contextlib
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import orjson

import consumers.watchers
from consumers.watchers import serving, training
from events.base import Envelope
from events.registry import restore
from events.topics import ROUTES
from mini_studio.bus import relay
from mini_studio.bus.kafka import Outgoing
from mini_studio.records import deployments, projection, routes, training_runs
from mini_studio.records.projection import Projection, fold
from mini_studio.records.store import Collection, Document, DuplicateRecord, JournalEntry
from mini_studio.records.training_runs import TrainingRun
from tests.faults.model.kernel import Call, Raised, io

NOW = 1000.0
START = datetime(2026, 1, 1, tzinfo=UTC)
STORED: dict[str, dict[str, Any]] = {}
"""Every event and route record by its id, which tells its content."""

Docs = tuple[tuple[str, str, bytes], ...]


@cache
def event(id: str) -> Envelope[Any]:
    return restore(STORED[id])


def known(stored: dict[str, Any]) -> str:
    """The key under which an entry's content can be looked up: an event's id, or a route's with its content."""
    key = _key(stored["topic"], stored["headers"]["ce_id"], stored["value"])
    STORED[key] = stored
    return key


def _key(topic: str, id: str, value: str | None) -> str:
    return f"{id}#{zlib.crc32((value or '').encode()):08x}" if topic == ROUTES else id


def is_route(key: str) -> bool:
    return "#" in key


class ModelStore:
    """Implements `RecordStore`. A document's version is its content's checksum, so that one content is one state."""

    async def insert(self, collection: Collection, document: Document) -> None:
        await io("insert", collection.name, packed(document))

    async def get(self, collection: Collection, id: str) -> Document | None:
        return unpacked(await io("get", collection.name, id))

    async def replace(self, collection: Collection, document: Document, version: int) -> bool:
        return bool(await io("replace", collection.name, packed(document), version))

    async def get_all(self, collection: Collection, ids: Sequence[str]) -> dict[str, Document]:
        found = [unpacked(content) for content in await io("get_all", collection.name, tuple(ids))]
        return {d["_id"]: d for d in found if d is not None}

    async def put_all(self, collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        return list(await io("put_all", collection.name, tuple((packed(d), version) for d, version in changes)))

    async def find(self, collection: Collection, where: Any, **_: Any) -> list[Document]:
        found = [unpacked(content) for content in await io("find", collection.name)]
        return [d for d in found if d is not None and all(d.get(k) == v for k, v in where.items())]

    async def pending(self, collections: Sequence[Collection], _limit: int) -> list[tuple[Collection, Document]]:
        named = {collection.name: collection for collection in collections}
        found = await io("pending", tuple(named))
        return [(named[name], document) for name, content in found if (document := unpacked(content)) is not None]

    async def settle(self, settled: Sequence[tuple[Collection, str, Sequence[str]]]) -> None:
        await io("settle", tuple((collection.name, id, tuple(ids)) for collection, id, ids in settled))

    async def journal(self, stored: Sequence[dict[str, Any]]) -> None:
        await io("journal", tuple(map(known, stored)))

    async def read_journal(self, **_: Any) -> list[JournalEntry]:
        return [JournalEntry(at, id, STORED[id]) for at, id in enumerate(await io("read_journal"), start=1)]


class ModelPublisher:
    """Implements `Publisher`: one record after the other, so that a crash may come between any two."""

    async def publish(self, records: Sequence[Outgoing]) -> None:
        for record in records:
            id, value = dict(record.headers)["ce_id"].decode(), record.value and record.value.decode()
            await io("publish", _key(record.topic, id, value))


def packed(document: Document) -> bytes:
    for entry in document["outbox"]:
        known(entry)
    content = {name: value for name, value in document.items() if name != "version"}
    version = zlib.crc32(orjson.dumps(content, option=orjson.OPT_SORT_KEYS))
    return orjson.dumps({**content, "version": version}, option=orjson.OPT_SORT_KEYS)


_unpacked: dict[bytes, Document] = {}


def unpacked(content: bytes | None) -> Document | None:
    if content is None:
        return None
    if content not in _unpacked:
        _unpacked[content] = orjson.loads(content)
    return {**_unpacked[content]}


def document(docs: Docs, collection: str) -> Document | None:
    """The one document of that collection."""
    return next((unpacked(content) for name, _, content in docs if name == collection), None)


def pending(docs: Docs) -> list[str]:
    return [known(entry) for *_, content in docs for entry in (unpacked(content) or {})["outbox"]]


def answer(world: Any, call: Call) -> Iterator[tuple[str, Any, Any]]:
    """In which ways the store, the journal and the log may answer: a note, the world after, the answer."""
    docs: Docs = world.docs
    match call:
        case Call("get", (name, id)):
            yield "", world, next((c for n, i, c in docs if (n, i) == (name, id)), None)
        case Call("get_all", (name, ids)):
            yield "", world, tuple(c for n, i, c in docs if n == name and i in ids)
        case Call("put_all", (name, changes)):
            put = []
            for content, version in changes:
                id = (unpacked(content) or {})["_id"]
                present = next((unpacked(c) for n, i, c in world.docs if (n, i) == (name, id)), None)
                put.append((present and present["version"]) == version)
                world = written(world, name, id, content) if put[-1] else world
            yield "" if all(put) else "(conflict)", world, tuple(put)
        case Call("find", (name,)):
            yield "", world, tuple(c for n, _, c in docs if n == name)
        case Call("pending", (names,)):
            yield "", world, tuple((n, c) for n, _, c in docs if n in names and (unpacked(c) or {})["outbox"])
        case Call("insert", (name, content)):
            id = (unpacked(content) or {})["_id"]
            if any((n, i) == (name, id) for n, i, _ in docs):
                yield "", world, Raised(DuplicateRecord, "id")
            else:
                yield "", written(world, name, id, content), None
        case Call("replace", (name, content, version)):
            id = (unpacked(content) or {})["_id"]
            present = next((unpacked(c) for n, i, c in docs if (n, i) == (name, id)), None)
            fits = present is not None and present["version"] == version
            yield "" if fits else "(conflict)", written(world, name, id, content) if fits else world, fits
        case Call("settle", (settled,)):
            for name, id, ids in settled:
                present = next(unpacked(c) for n, i, c in world.docs if (n, i) == (name, id)) or {}
                left = [entry for entry in present["outbox"] if entry["headers"]["ce_id"] not in ids]
                world = written(world, name, id, packed({**present, "outbox": left}))
            yield "", world, None
        case Call("journal", (ids,)):
            new = tuple(id for id in ids if id not in world.journal)
            yield "", world._replace(journal=world.journal + new), None
        case Call("read_journal", ()):
            yield "", world, world.journal
        case Call("publish", (id,)):
            yield "", world._replace(log=(*world.log, id)), None
        case _:
            raise TypeError(f"nobody answers {call}")


def written(world: Any, name: str, id: str, content: bytes) -> Any:
    """The world with the document; events that are new in its outbox are decided by this very write."""
    docs = tuple(sorted([d for d in world.docs if d[:2] != (name, id)] + [(name, id, content)]))
    new = [known(entry) for entry in (unpacked(content) or {})["outbox"]]
    return world._replace(docs=docs, decided=world.decided + tuple(i for i in new if i not in world.decided))


@lru_cache(maxsize=200_000)
def wrong_events(docs: Docs, decided: Sequence[str], journal: Sequence[str], log: Sequence[str]) -> str | None:
    """What is wrong with the way that events went: written with a record, journal, log, and only then out of the outbox."""
    waiting = pending(docs)
    if phantoms := ({*journal} | {*log}) - {*decided}:
        return f"an event that no record knows of: {phantoms}"
    if unknown := {key for key in {*log} - {*journal} if not is_route(key)}:
        return f"on the log and not in the journal: {unknown}"
    if lost := {*decided} - {*waiting} - {*log}:
        return f"left its outbox and is not on the log: {lost}"
    for name, keys in (("records", decided), ("journal", journal), ("log", dict.fromkeys(log))):
        numbers: dict[str, list[int]] = defaultdict(list)
        for key in keys:
            if not is_route(key):
                numbers[event(key).source].append(event(key).sequence)
        for source, found in numbers.items():
            if found != list(range(1, len(found) + 1)):
                return f"sequences of {source} in the {name}: {found}"
    return None


@lru_cache(maxsize=200_000)
def wrong_projection(projection: type[Projection], docs: Docs, decided: Sequence[str]) -> str | None:
    """A record is what its events make, as far as it has applied them, whatever order they came in."""
    live = document(docs, projection.COLLECTION.name)
    if live is None:
        return None
    events = [event(key) for key in decided if not is_route(key)]
    made = fold(projection, [e for e in events if e.sequence <= live["applied"].get(e.source.value, 0)])
    expected = made and orjson.loads(orjson.dumps(made.document()))
    names = {*live, *(expected or ())} - {"outbox", "version"}
    wrong = {name: (live.get(name), expected and expected.get(name)) for name in sorted(names)}
    wrong = {name: pair for name, pair in wrong.items() if pair[0] != pair[1]}
    return f"the record is not what its events make, but (is, should be): {wrong}" if wrong else None


class _Clock:
    @staticmethod
    def now(_zone: Any = None) -> datetime:
        return START

    fromisoformat = datetime.fromisoformat


_of = Envelope.of.__func__  # type: ignore[attr-defined]


def _told_by_content(cls: Any, data: Any, **about: Any) -> Any:
    """The id says what happened, so the same decision taken in another state is the same event."""
    mark = zlib.crc32(data.model_dump_json().encode())
    of = _of(cls, data, **about, time=START + timedelta(seconds=about["sequence"]))
    return of.model_copy(update={"id": f"{data.SOURCE.value}.{about['sequence']}.{data.TYPE}.{mark:08x}"})


_begin_attempt = TrainingRun.begin_attempt


def token_by_attempt(run: TrainingRun) -> TrainingRun | None:
    begun = _begin_attempt(run)
    return begun and begun.model_copy(update={"token": f"token-{begun.attempt}"})


def _reraise(*_: Any, **__: Any) -> None:
    raise  # noqa: PLE0704 - a surprise in the code under test, or in the model, ends the search


class Quiet:
    debug = info = warning = error = lambda *_, **__: None
    exception = _reraise


@contextlib.contextmanager
def repeatable(files: dict[str, Any], replaced: Sequence[tuple[Any, str, Any]] = ()) -> Iterator[None]:
    """Ids and times are functions of what happened, and file calls are answered by `files`. `replaced`: a seeded bug."""

    async def to_thread(call: Any, *args: Any) -> Any:
        return await files[call.__name__](*args)

    async def at_once(call: Any, *args: Any) -> Any:
        return call(*args)

    async def one_by_one(*works: Any, return_exceptions: bool) -> list[Any]:
        """What runs side by side may as well run one behind another."""
        assert return_exceptions
        ends = []
        try:
            for work in works:
                try:
                    ends.append(await work)
                except Exception as error:
                    ends.append(error)
        finally:
            for work in works:
                work.close()  # a search drops most threads in the middle
        return ends

    patches = [
        (Envelope, "of", classmethod(_told_by_content)),
        (TrainingRun, "begin_attempt", token_by_attempt),
        (training_runs, "datetime", SimpleNamespace(now=lambda _: datetime.fromtimestamp(0, UTC))),
        (routes, "datetime", _Clock),
        (projection, "asyncio", SimpleNamespace(to_thread=at_once)),
        (relay, "asyncio", SimpleNamespace(gather=one_by_one, Event=asyncio.Event)),
        (training, "asyncio", SimpleNamespace(to_thread=to_thread)),
        (training, "time", SimpleNamespace(time=lambda: NOW)),
        (serving, "time", SimpleNamespace(time=lambda: NOW)),
        *((module, "log", Quiet()) for module in (consumers.watchers, training, serving, relay, deployments)),
        *replaced,
    ]
    with contextlib.ExitStack() as stack:
        for target, name, value in patches:
            stack.enter_context(patch.object(target, name, value))
        yield
