"""What must hold after any faults, looked up offline in what is left: the client's history, the log, the records, the journal, the folders.

`collect` dumps a studio's state into a `Dump`; `violations` says in words what is wrong with it, and nothing when all is well.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from events.base import Envelope
from events.deployments import DeployRequested
from events.fine_tuning import FineTuneCancelled, FineTuneFailed, FineTuneRequested, FineTuneSucceeded
from events.registry import UndecodableEvent, decode, restore
from events.topics import ROUTES, Topic
from events.types import DeploymentStatus
from mini_studio.bus.delivery import text_headers
from mini_studio.bus.kafka import all_topics
from mini_studio.drivers.releases import held_in
from mini_studio.records.datasets import Dataset
from mini_studio.records.deployments import Deployment
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold
from mini_studio.records.routes import RouteRecord
from mini_studio.records.store import Document
from mini_studio.settings import Settings
from mini_studio.wiring import RECORDS, open_studio
from tests.fakes.log import read_all
from tests.faults.history import Request
from workloads.specs import COMMITTED, MANIFEST, Manifest

BOOKKEEPING = frozenset({"outbox", "version"})
"""What a record holds beside what its events say."""
DEAD = ".dead"
PROJECTIONS = (Dataset, Job, Deployment)


@dataclass
class Dump:
    """A studio's whole state, at rest."""

    log: dict[str, list[Envelope[Any]]] = field(default_factory=dict)
    """Events by topic, partition by partition, in order."""
    not_events: list[str] = field(default_factory=list)
    """Records on the event topics that are none."""
    journal: list[Envelope[Any]] = field(default_factory=list)
    records: dict[str, dict[str, Document]] = field(default_factory=dict)
    """Documents by collection and id."""
    artifacts: dict[str, list[Manifest]] = field(default_factory=dict)
    """Complete attempts by job id."""
    committed: dict[str, str] = field(default_factory=dict)
    """Where each job's final path points, by job id."""
    dead: list[str] = field(default_factory=list)
    """Records on the dead-letter topics, with the reasons."""
    routes: dict[str, Any] = field(default_factory=dict)
    """Last value of each key on the topic of routes; None: a tombstone."""
    served: dict[str, str] = field(default_factory=dict)
    """What the local serving driver holds: deployment id by name."""


async def collect(settings: Settings) -> Dump:
    """Everything there is of the studio with these settings."""
    dump = Dump()
    for topic in Topic:
        dump.log[topic] = []
        for record in await read_all(settings.kafka.bootstrap, topic):
            try:
                dump.log[topic].append(decode(record.key, text_headers(record), record.value))
            except UndecodableEvent as error:
                dump.not_events.append(f"{topic}/{record.partition}@{record.offset}: {error.reason}")
    for name in all_topics():
        if name == ROUTES:
            for record in await read_all(settings.kafka.bootstrap, name):
                dump.routes[record.key.decode()] = json.loads(record.value) if record.value else None
        elif name.endswith(DEAD):
            for record in await read_all(settings.kafka.bootstrap, name):
                dump.dead.append(f"{name}@{record.offset}: {text_headers(record).get('dlq_reason')}")
    async with open_studio(settings) as studio:
        position = 0
        while entries := await studio.store.read_journal(after=position, limit=5000):
            dump.journal += [restore(entry.stored) for entry in entries]
            position = entries[-1].position
        for record in RECORDS:
            found = await studio.store.find(record.COLLECTION, {}, limit=10_000_000)
            dump.records[record.COLLECTION.name] = {document["_id"]: document for document in found}
    for manifest in settings.models.glob(f"*/job_*/attempts/*/{MANIFEST}"):
        job = manifest.parents[2].name
        dump.artifacts.setdefault(job, []).append(Manifest.model_validate_json(manifest.read_bytes()))
    for link in settings.models.glob(f"*/job_*/{COMMITTED}"):
        dump.committed[link.parent.name] = str(link.readlink())
    for folder in sorted((settings.data / "serving").glob("[!.]*")):
        held = held_in(folder)
        if held is not None:
            dump.served[folder.name] = held.deployment_id
    return dump


def violations(dump: Dump, requests: dict[str, Request], *, all_over: bool = True, ordered: bool = True) -> list[str]:
    """All that is wrong. `all_over`: nothing is on its way any more, so every job has to have ended.

    `ordered`: events stand in order on the log too, not in the journal alone; an embedded broker that was replaced may have its refill
    behind what is newer.
    """
    found = [*_lost(dump, requests), *_twice_by_key(dump, requests), *_phantoms(dump, requests)]
    found += _sequences(dump, ordered)
    found += [*_same_as_events(dump), *_one_artifact(dump), *_left_behind(dump)]
    found += [f"dead letter: {text}" for text in dump.dead]
    if all_over:
        found += [*_not_over(dump), *_not_as_wanted(dump), *_not_routed(dump)]
    return found


def _lost(dump: Dump, requests: dict[str, Request]) -> Iterator[str]:
    """What was acknowledged is in the journal, on the log and in the records."""
    collections = {
        "upload": "datasets", "delete": "datasets", "submit": "jobs", "cancel": "jobs", "deploy": "deployments",
        "remove": "deployments",
    }  # fmt: skip
    journalled = {envelope.subject for envelope in dump.journal}
    logged = {envelope.subject for envelopes in dump.log.values() for envelope in envelopes}
    for request in requests.values():
        if request.acknowledged:
            assert request.subject is not None
            if request.subject not in dump.records[collections[request.kind]]:
                yield f"{request.kind} {request.request_id}: {request.subject} has no record"
            for name, there in (("journal", journalled), ("log", logged)):
                if request.subject not in there:
                    yield f"{request.kind} {request.request_id}: {request.subject} is not in the {name}"


def _twice_by_key(dump: Dump, requests: dict[str, Request]) -> Iterator[str]:
    """Requests under one key made one thing."""
    made: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for request in requests.values():
        if request.key and request.acknowledged:
            assert request.subject is not None
            made[request.kind, request.client_code, request.key].add(request.subject)
    yield from (f"key {key} made {sorted(subjects)}" for key, subjects in made.items() if len(subjects) > 1)
    asked = Counter(e.subject for e in dump.journal if isinstance(e.data, FineTuneRequested))
    yield from (f"{subject} was requested {count} times" for subject, count in asked.items() if count > 1)


def _phantoms(dump: Dump, requests: dict[str, Request]) -> Iterator[str]:
    """Every event follows from a request of the history, and the log holds what the journal holds, no more and no less."""
    yield from (f"not an event: {text}" for text in dump.not_events)
    journal = {envelope.id: envelope for envelope in dump.journal}
    logged = {envelope.id: envelope for envelopes in dump.log.values() for envelope in envelopes}
    for id, envelope in logged.items():
        if id not in journal:
            yield f"{envelope.type} {id} of {envelope.subject} is on the log and not in the journal"
        elif envelope != journal[id]:
            yield f"{envelope.type} {id} of {envelope.subject} is another one on the log than in the journal"
    for id, envelope in journal.items():
        if id not in logged:
            yield f"{envelope.type} {id} of {envelope.subject} is in the journal and not on the log"
        if envelope.cause.correlation_id not in requests:
            yield f"{envelope.type} {id} of {envelope.subject} follows from no request: {envelope.cause.correlation_id}"


def _sequences(dump: Dump, ordered: bool) -> Iterator[str]:
    """Contiguous from 1 per aggregate and source: in the journal, and on the log once repeats are dropped (sorted, if not `ordered`)."""
    ids: dict[tuple[str, str, int], str] = {}
    logs = dump.log if ordered else {t: sorted(found, key=lambda e: e.sequence) for t, found in dump.log.items()}
    for name, envelopes in (("journal", dump.journal), *logs.items()):
        last: dict[tuple[str, str], int] = {}
        for envelope in envelopes:
            place = (envelope.subject, envelope.source.value)
            first = ids.setdefault((*place, envelope.sequence), envelope.id)
            if first != envelope.id:
                yield f"{name}: {place} has two events of sequence {envelope.sequence}"
            if envelope.sequence > last.get(place, 0) + 1:
                yield f"{name}: {place} goes from {last.get(place, 0)} to {envelope.sequence}"
            last[place] = max(last.get(place, 0), envelope.sequence)


def _same_as_events(dump: Dump) -> Iterator[str]:
    """Every projection is its events, folded."""
    for projection in PROJECTIONS:
        name = projection.COLLECTION.name
        histories: dict[str, list[Envelope[Any]]] = defaultdict(list)
        for envelope in dump.journal:
            histories[envelope.subject].append(envelope)
        for id, document in dump.records[name].items():
            rebuilt = fold(projection, histories[id])
            if rebuilt is None or content(rebuilt.document()) != content(document):
                yield f"{name}/{id} is not what its events make: {difference(rebuilt and rebuilt.document(), document)}"


def content(document: Document) -> Document:
    """A record without its bookkeeping."""
    return {name: value for name, value in document.items() if name not in BOOKKEEPING}


def difference(rebuilt: Document | None, live: Document) -> str:
    if rebuilt is None:
        return "no events"
    fields = {name for name in {*rebuilt, *live} - BOOKKEEPING if rebuilt.get(name) != live.get(name)}
    return json.dumps({name: [rebuilt.get(name), live.get(name)] for name in sorted(fields)})


def _not_routed(dump: Dump) -> Iterator[str]:
    """The routes are what the deployments make, and the topic holds them."""
    for id, document in dump.records["deployments"].items():
        kept = dump.records["routes"].get(id, {"route": None})["route"]
        made = RouteRecord.of(Deployment.load(document)).document()["route"]
        if _same_route(kept) != _same_route(made):
            yield f"route {id} is not what its deployment makes: {kept}, {made}"
        if dump.routes.get(id) != kept:
            yield f"route {id} is another one on the topic: {dump.routes.get(id)}, {kept}"


def _same_route(route: Document | None) -> Document | None:
    """Without the revision, which counts changes."""
    return None if route is None else {name: value for name, value in route.items() if name != "revision"}


def _one_artifact(dump: Dump) -> Iterator[str]:
    """A job ends once, with the artifact of the attempt that its event names."""
    ends: dict[str, list[Envelope[Any]]] = defaultdict(list)
    for envelope in dump.journal:
        if isinstance(envelope.data, FineTuneSucceeded | FineTuneFailed | FineTuneCancelled):
            ends[envelope.subject].append(envelope)
    for job, ended in ends.items():
        if len(ended) > 1:
            yield f"{job} ended {len(ended)} times"
        event = ended[-1].data
        target = dump.committed.get(job)
        if isinstance(event, FineTuneSucceeded):
            if target is None or target.split("/")[1] != str(event.attempt):
                yield f"{job} succeeded with attempt {event.attempt}, its final path points at {target}"
            run = dump.records["training_runs"].get(job, {})
            tokens = {m.attempt: m.token for m in dump.artifacts.get(job, [])}
            if tokens.get(event.attempt) != run.get("token"):
                yield f"{job}: the committed attempt is not the one whose token holds"
        elif target is not None:
            yield f"{job} failed or was cancelled, and its final path points at {target}"
    yield from (f"{job} has a final path and no end" for job in dump.committed if job not in ends)


def _left_behind(dump: Dump) -> Iterator[str]:
    """Nothing waits in an outbox."""
    for name, documents in dump.records.items():
        for id, document in documents.items():
            if document["outbox"]:
                yield f"{name}/{id} still has {len(document['outbox'])} events in its outbox"


def _not_over(dump: Dump) -> Iterator[str]:
    for id, document in dump.records["jobs"].items():
        if document["status"] not in ("succeeded", "failed", "cancelled"):
            yield f"jobs/{id} is {document['status']}"


def _not_as_wanted(dump: Dump) -> Iterator[str]:
    """The serving driver has one object per wanted deployment, and no other."""
    gone = (DeploymentStatus.REMOVED, DeploymentStatus.FAILED)
    wanted = {d["name"]: id for id, d in dump.records["deployments"].items() if d["status"] not in gone}
    failed = {d["name"] for d in dump.records["deployments"].values() if d["status"] == DeploymentStatus.FAILED}
    for name, id in wanted.items():
        if dump.served.get(name) != id:
            yield f"deployment {name} ({id}) is wanted; the driver has {dump.served.get(name)}"
    yield from (f"the driver has {name}, which nobody wants" for name in dump.served.keys() - wanted.keys() - failed)
    asked = {e.subject: e.data.name for e in dump.journal if isinstance(e.data, DeployRequested)}
    for id, name in asked.items():
        if dump.records["deployments"].get(id, {}).get("name") != name:
            yield f"deployment {id} was asked for as {name}"
