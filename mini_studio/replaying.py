"""`mini-studio replay`: projections are rebuilt from the journal or from the topics, compared with the live records, and swapped in.

It runs beside a live system, in constant memory. It decides nothing and calls neither Ray nor the model servers, and publishes
nothing; a route that it repairs leaves through its outbox, as every newer route does.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import structlog

from events.base import Envelope
from events.registry import UndecodableEvent, decode, restore
from events.topics import Topic
from mini_studio.bus.delivery import text_headers
from mini_studio.bus.reading import read_whole
from mini_studio.records.datasets import Dataset
from mini_studio.records.deployments import Deployment
from mini_studio.records.jobs import Job
from mini_studio.records.projection import Projection
from mini_studio.records.routes import RouteRecord
from mini_studio.records.shadow import Outcome, Shadow, View
from mini_studio.settings import Settings
from mini_studio.wiring import Studio, open_studio

log = structlog.get_logger(__name__)

BATCH = 2000
"""Events held in memory at a time."""
SAY_EVERY_S = 2.0

Say = Callable[[str], None]
Batches = AsyncIterator[list[Envelope[Any]]]


@dataclass(frozen=True)
class Rebuildable:
    """What can be replayed: the events it follows, the projection they fold into, and the live records that show it."""

    topic: Topic
    projection: type[Projection]
    view: View[Any]


REBUILDABLE = {
    "datasets": Rebuildable(Topic.DATASETS, Dataset, View(Dataset.COLLECTION, lambda dataset: dataset)),
    "jobs": Rebuildable(Topic.FINE_TUNES, Job, View(Job.COLLECTION, lambda job: job)),
    "deployments": Rebuildable(Topic.DEPLOYMENTS, Deployment, View(Deployment.COLLECTION, lambda present: present)),
    "routes": Rebuildable(Topic.DEPLOYMENTS, Deployment, View(RouteRecord.COLLECTION, RouteRecord.of)),
}


async def run(settings: Settings, names: Sequence[str], *, topics: bool, swap: bool, say: Say) -> bool:
    """Replay as the command line asks; says whether the live records are now what their events make."""
    async with open_studio(settings) as studio:
        outcomes = await replay(studio, names, topics=topics, swap=swap, say=say)
    for name, outcome in outcomes.items():
        say(f"{name}: {summary(outcome, swap=swap)}")
    return all(right(outcome, swap=swap) for outcome in outcomes.values())


async def replay(studio: Studio, names: Sequence[str], *, topics: bool, swap: bool, say: Say) -> dict[str, Outcome]:
    """Rebuild the projections, in one pass over the journal or over their topics."""
    wanted = {name: REBUILDABLE[name] for name in names}
    shadows = {each.topic: Shadow(studio.store, each.projection) for each in wanted.values()}
    for shadow in shadows.values():
        await shadow.clear()
    source = from_topics(studio, list(shadows)) if topics else from_journal(studio, list(shadows))
    count, said = 0, time.monotonic()
    async for envelopes in source:
        for topic, shadow in shadows.items():
            await shadow.fold(envelope for envelope in envelopes if envelope.topic == topic)
        count += len(envelopes)
        if time.monotonic() > said + SAY_EVERY_S:
            say(f"{count:,} events folded")
            said = time.monotonic()
    say(f"{count:,} events folded; comparing with the live records")
    outcomes = {name: await shadows[each.topic].compare(each.view, swap=swap) for name, each in wanted.items()}
    for shadow in shadows.values():
        await shadow.clear()
    return outcomes


async def from_journal(studio: Studio, topics: Sequence[Topic]) -> Batches:
    """The events of these topics in journal order, up to what was its end when this began."""
    position, end = 0, await studio.store.journal_end()
    while position < end and (entries := await studio.store.read_journal(after=position, limit=BATCH)):
        yield list(_readable(entry.stored for entry in entries if entry.stored["topic"] in topics))
        position = entries[-1].position


async def from_topics(studio: Studio, topics: Sequence[Topic]) -> Batches:
    """The events that the topics hold by now, in order within a partition; repeats and all."""
    async for records in read_whole(studio.settings.kafka, [topic.value for topic in topics]):
        envelopes = []
        for record in records:
            try:
                envelopes.append(decode(record.key, text_headers(record), record.value))
            except UndecodableEvent as error:
                log.warning("replay.skipped", topic=record.topic, offset=record.offset, reason=error.reason)
        yield envelopes


def _readable(stored: Iterable[dict[str, Any]]) -> Iterable[Envelope[Any]]:
    """What this version can read: consumers dead-letter the rest."""
    for entry in stored:
        try:
            yield restore(entry)
        except UndecodableEvent as error:
            log.warning("replay.skipped", event_id=entry["headers"].get("ce_id"), reason=error.reason)


def summary(outcome: Outcome, *, swap: bool) -> str:
    counts = asdict(outcome)
    if swap:
        counts = {"repaired" if name == "different" else name: count for name, count in counts.items()}
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())


def right(outcome: Outcome, *, swap: bool) -> bool:
    """Whether the live records are what their events make, if need be after the swap."""
    unlike = outcome.unexplained + outcome.in_the_way
    return not (unlike if swap else unlike + outcome.different + outcome.missing)
