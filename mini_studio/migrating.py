"""`mini-studio records migrate`: the records of another store, in the one that the settings name.

The journal is copied event by event, in its order; what is nothing but events is built anew from it, by a replay; what the
deciders hold beside their events (training runs, releases, profiles, keys) is copied, as usage is. Last, both stores are read once more and
compared. Every step finds what an earlier run left, and goes on behind it.
"""

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

from pydantic import SecretStr

from mini_studio.errors import Conflict, Invalid
from mini_studio.records.shadow import content
from mini_studio.records.store import Collection, Document, RecordStore, pages
from mini_studio.replaying import REBUILDABLE, replay
from mini_studio.settings import Records, Settings
from mini_studio.wiring import COLLECTIONS, Studio, open_studio, record_store

BATCH = 500
PATIENCE_S = 30.0
"""A request has to be refused soon; a migration may wait for a busy store."""
NAMED = 5
"""Documents that differ and are named."""
REBUILT = tuple(rebuildable.view.collection for rebuildable in REBUILDABLE.values())
COPIED = tuple(collection for collection in COLLECTIONS if collection not in REBUILT)
MONGODB = ("mongodb://", "mongodb+srv://")

Say = Callable[[str], None]


async def run(settings: Settings, place: str, database: str, say: Say) -> bool:
    """Migrate from the file or the MongoDB at `place`; says whether the two stores now hold the same."""
    target = _patient(settings, settings.records)
    source = _patient(settings, _records(place, database))
    if _identity(source) == _identity(target):
        raise Invalid("the records are there already: name another place with --from, or set the new one first")
    store = record_store(source)
    async with aclosing(store), open_studio(target) as studio:
        return await migrate(store, studio, say)


def _patient(settings: Settings, records: Records) -> Settings:
    patient = records.model_copy(update={"busy_timeout_s": max(PATIENCE_S, records.busy_timeout_s)})
    return settings.model_copy(update={"records": patient})


def _records(place: str, database: str) -> Records:
    if place.startswith(MONGODB):
        return Records(mongo_url=SecretStr(place), mongo_database=database)
    if not Path(place).is_file():  # a store would make one
        raise Invalid(f"--from: there is no file {place}")
    return Records(sqlite=Path(place))


def _identity(settings: Settings) -> tuple[str, str]:
    records = settings.records
    if records.mongo_url is None:
        return "", str(settings.record_file)
    return records.mongo_url.get_secret_value(), records.mongo_database


async def migrate(source: RecordStore, studio: Studio, say: Say) -> bool:
    """Bring the studio's own store to what `source` holds. Raises `Conflict` before anything is written that does not belong."""
    target = studio.store
    await target.prepare()
    await _check_at_rest(source)
    shared = await _shared(source, target)
    for collection in COLLECTIONS:
        await _check_known(source, target, collection)
    await _copy_journal(source, target, shared, say)
    for collection in COPIED:
        await _copy(source, target, collection)
    await replay(studio, list(REBUILDABLE), topics=False, swap=True, say=say)
    await _settle_routes(target)
    return await compare(source, target, say)


async def _check_at_rest(source: RecordStore) -> None:
    pending = await source.pending(COLLECTIONS, BATCH)
    if pending:
        named = ", ".join(f"{collection.name}/{document['_id']}" for collection, document in pending[:NAMED])
        raise Conflict(
            f"the source has events that are not on the log yet, in {named}: let a studio on it run with its broker until "
            "they are (`mini-studio relay` alone will do), stop it, and migrate again"
        )


async def _shared(source: RecordStore, target: RecordStore) -> int:
    """Up to which of its positions the source's journal is in the target already. Raises `Conflict` if anything else is."""
    position = behind = 0
    while there := await target.read_journal(after=behind, limit=BATCH):
        here = await source.read_journal(after=position, limit=len(there))
        if [entry.stored for entry in there] != [entry.stored for entry in here]:
            raise Conflict(f"the target's journal has events that the source's has not: {_USE_ANOTHER}")
        position, behind = here[-1].position, there[-1].position
    return position


async def _check_known(source: RecordStore, target: RecordStore, collection: Collection) -> None:
    """The target may hold what an earlier run brought there: records that the source has, and no newer ones."""
    async for page in pages(target, collection, BATCH):
        known = await source.get_all(collection, [document["_id"] for document in page])
        for document in page:
            original = known.get(document["_id"])
            if original is None or (collection in COPIED and not _may_precede(document, original)):
                what = f"{collection.name}/{document['_id']}"
                raise Conflict(f"the target has {what}, which the source has not, or not yet: {_USE_ANOTHER}")


def _may_precede(document: Document, original: Document) -> bool:
    """Whether it is the same, or an earlier state of the same record."""
    return document["version"] < original["version"] or content(document) == content(original)


async def _copy_journal(source: RecordStore, target: RecordStore, position: int, say: Say) -> None:
    copied = 0
    while entries := await source.read_journal(after=position, limit=BATCH):
        await target.journal([entry.stored for entry in entries])
        position = entries[-1].position
        copied += len(entries)
        say(f"{copied:,} events copied")


async def _copy(source: RecordStore, target: RecordStore, collection: Collection) -> None:
    async for page in pages(source, collection, BATCH):
        present = await target.get_all(collection, [document["_id"] for document in page])
        lacking = [document for document in page if present.get(document["_id"]) != document]
        versions = [present[d["_id"]]["version"] if d["_id"] in present else None for d in lacking]
        if not all(await target.put_all(collection, list(zip(lacking, versions, strict=True)))):
            raise Conflict(f"somebody else is writing {collection.name} of the target: stop that, and migrate again")


async def _settle_routes(target: RecordStore) -> None:
    """The replay leaves every route to be published; the source has published the very same ones."""
    while pending := await target.pending(REBUILT, BATCH):
        ids = [[entry["headers"]["ce_id"] for entry in document["outbox"]] for _, document in pending]
        await target.settle([(c, document["_id"], told) for (c, document), told in zip(pending, ids, strict=True)])


async def compare(source: RecordStore, target: RecordStore, say: Say) -> bool:
    """Read both to their ends, and say of every collection and of the journal whether they hold the same."""
    right = [await _compare(source, target, collection, say) for collection in COLLECTIONS]
    return all([*right, await _compare_journals(source, target, say)])


async def _compare(source: RecordStore, target: RecordStore, collection: Collection, say: Say) -> bool:
    """All of the documents but for their bookkeeping: what they are made of, not how often they were written."""
    count, different = 0, list[str]()
    async for page in pages(source, collection, BATCH):
        there = await target.get_all(collection, [document["_id"] for document in page])
        count += len(page)
        different += [d["_id"] for d in page if content(d) != content(there.get(d["_id"]))]
    async for page in pages(target, collection, BATCH):
        known = await source.get_all(collection, [document["_id"] for document in page])
        different += [document["_id"] for document in page if document["_id"] not in known]
    if different:
        named = ", ".join(different[:NAMED])
        say(
            f"{collection.name}: {len(different):,} of {count:,} DIFFER ({named}): either the source is being written, so stop "
            "its studio and migrate again; or its records are not what its events make, see `mini-studio replay all` there"
        )
    else:
        say(f"{collection.name}: {count:,} identical")
    return not different


async def _compare_journals(source: RecordStore, target: RecordStore, say: Say) -> bool:
    count = position = behind = 0
    while True:
        here = await source.read_journal(after=position, limit=BATCH)
        there = await target.read_journal(after=behind, limit=BATCH)
        if [entry.stored for entry in here] != [entry.stored for entry in there]:
            say(
                f"journal: DIFFERS behind {count:,} events: is the source being written? Stop its studio and migrate again"
            )
            return False
        if not here:
            say(f"journal: {count:,} events identical, in the same order")
            return True
        count += len(here)
        position, behind = here[-1].position, there[-1].position


_USE_ANOTHER = "name an empty place (records.mongo_database or records.sqlite), or empty this one"
