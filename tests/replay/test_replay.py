"""Replay over what real consumers made: it gives the same documents, repairs what differs, and touches nothing else."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from events.fine_tuning import FineTuneProgressed, FineTuneQueued
from events.types import new_id
from mini_studio import replaying
from mini_studio.bus.kafka import Outgoing, all_topics
from mini_studio.bus.relay import outgoing
from mini_studio.errors import Conflict, Unavailable
from mini_studio.maintenance import refill_topics
from mini_studio.records import shadow
from mini_studio.records.deployments import Deployment, removal
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold, requested
from mini_studio.records.record import ANYONE
from mini_studio.records.routes import RouteRecord
from mini_studio.records.shadow import Outcome, Shadow, content
from mini_studio.records.store import Collection, Document, RecordStore
from mini_studio.settings import Settings
from mini_studio.wiring import COLLECTIONS, SHADOWS, Studio, open_studio
from tests.consumers.cases import CAUSE, deploy, envelope, eventually, fine_tune
from tests.fakes.broker import running_broker
from tests.fakes.log import read_all
from tests.replay.conftest import Lived, consuming, quiet

pytestmark = pytest.mark.asyncio(loop_scope="session")

EVERYTHING = list(replaying.REBUILDABLE)
SOURCES = pytest.mark.parametrize("topics", [False, True], ids=["journal", "topics"])


async def replay(studio: Studio, *names: str, topics: bool = False, swap: bool = True) -> dict[str, Outcome]:
    return await replaying.replay(studio, names or EVERYTHING, topics=topics, swap=swap, say=lambda text: None)


async def documents(store: RecordStore, *collections: Collection) -> dict[str, dict[str, Document]]:
    """Whole documents by collection and id."""
    return {
        collection.name: {document["_id"]: document for document in await store.scan(collection, limit=10_000)}
        for collection in collections or COLLECTIONS
    }


def contents(found: dict[str, dict[str, Document]]) -> dict[str, dict[str, Any]]:
    return {name: {id: content(document) for id, document in those.items()} for name, those in found.items()}


async def log_ends(settings: Settings) -> dict[str, int]:
    topics = all_topics()
    found = await asyncio.gather(*(read_all(settings.kafka.bootstrap, topic) for topic in topics))
    return {topic: len(records) for topic, records in zip(topics, found, strict=True)}


class Untouched:
    """Stands for Ray, the model servers and the stores of objects: counts whatever is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name == "aclose":
            raise AttributeError(name)
        self.calls.append(name)
        return lambda *args, **options: None


@contextlib.asynccontextmanager
async def isolated(settings: Settings) -> AsyncIterator[tuple[Studio, list[str]]]:
    """A studio as the command opens it, and the calls of everything that it must leave alone."""
    async with open_studio(settings) as studio:
        parts = Untouched()
        studio.cluster = studio.serving = studio.dfs = studio.s3 = studio.catalogue = parts  # type: ignore[assignment]

        async def publish(records: Any) -> None:
            parts.calls.append("publish")

        studio.publisher.publish = publish  # type: ignore[method-assign]
        yield studio, parts.calls


@SOURCES
async def test_nothing_differs_and_nothing_is_touched(lived: Lived, topics: bool) -> None:
    ends = await log_ends(lived.settings)
    async with isolated(lived.settings) as (studio, calls):
        before, journal = await documents(studio.store), await studio.store.journal_end()
        outcomes = await replay(studio, topics=topics)
        assert outcomes == {
            "datasets": Outcome(same=2), "jobs": Outcome(same=lived.jobs),
            "deployments": Outcome(same=lived.deployments), "routes": Outcome(same=lived.deployments),
        }  # fmt: skip
        assert await documents(studio.store) == before, "versions included"
        assert await studio.store.journal_end() == journal
        assert not any((await documents(studio.store, *SHADOWS)).values()), "the shadows are cleared"
        assert calls == []
    assert await log_ends(lived.settings) == ends


@SOURCES
async def test_what_is_dropped_comes_back_identical(lived: Lived, topics: bool) -> None:
    ends = await log_ends(lived.settings)
    async with isolated(lived.settings) as (studio, calls):
        before = await documents(studio.store)
        for each in replaying.REBUILDABLE.values():
            await studio.store.clear(each.view.collection)
        checked = await replay(studio, topics=topics, swap=False)
        assert (checked["jobs"], checked["routes"]) == (Outcome(missing=lived.jobs), Outcome(missing=lived.deployments))
        assert not (await documents(studio.store, Job.COLLECTION))["jobs"]
        outcomes = await replay(studio, topics=topics)
        assert [outcome.missing for outcome in outcomes.values()] == [2, lived.jobs, *[lived.deployments] * 2]
        assert contents(await documents(studio.store)) == contents(before)
        waiting = {collection.name for collection, _ in await studio.store.pending(COLLECTIONS, 1000)}
        assert waiting == {"routes"}, "gateways might not have seen these; nothing else is to be published"
        assert calls == []
    assert await log_ends(lived.settings) == ends


async def test_jobs_and_routes_alone_come_back_identical(lived: Lived) -> None:
    async with open_studio(lived.settings) as studio:
        before = await documents(studio.store)
        for collection in (Job.COLLECTION, RouteRecord.COLLECTION):
            await studio.store.clear(collection)
        await replay(studio, "jobs", "routes")
        assert contents(await documents(studio.store)) == contents(before)


async def test_what_differs_is_told_apart_and_repaired(lived: Lived) -> None:
    async with open_studio(lived.settings) as studio:
        before = await documents(studio.store)
        wrong, lost, *_ = sorted(before["jobs"])
        nobodys = {**before["jobs"][lost], "_id": new_id("job")}
        changed = {**before["jobs"][wrong], "status": "failed", "version": 99}
        await studio.store.replace(Job.COLLECTION, changed, before["jobs"][wrong]["version"])
        await take_away(studio.store, Job.COLLECTION, lost)
        await studio.store.insert(Job.COLLECTION, nobodys)
        tampered = await documents(studio.store)
        found = Outcome(same=lived.jobs - 2, different=1, missing=1, unexplained=1)
        assert (await replay(studio, "jobs", swap=False))["jobs"] == found
        assert await documents(studio.store) == tampered, "a check changes nothing"
        assert (await replay(studio, "jobs"))["jobs"] == found
        after = await documents(studio.store)
        assert after["jobs"].pop(nobodys["_id"]) == nobodys, "what no event explains is left as it is"
        assert contents(after) == contents(before)
        assert after["jobs"][wrong]["version"] == 100
        assert (await replay(studio, "jobs"))["jobs"] == Outcome(same=lived.jobs, unexplained=1)


async def take_away(store: RecordStore, collection: Collection, id: str) -> None:
    kept = [document for document in await store.scan(collection, limit=10_000) if document["_id"] != id]
    await store.clear(collection)
    await store.put_all(collection, [(document, None) for document in kept])


async def test_a_repaired_route_is_published_and_the_others_are_not(lived: Lived) -> None:
    async with open_studio(lived.settings) as studio:
        route, *_ = await studio.routes.where(ANYONE)
        stale = route.model_copy(update={"revision": 1, "version": route.version + 1})
        assert await studio.store.replace(RouteRecord.COLLECTION, stale.document(), route.version)
        assert (await replay(studio, "routes"))["routes"] == Outcome(same=lived.deployments - 1, different=1)
        ((_, pending),) = await studio.store.pending(COLLECTIONS, 100)
        assert [entry["headers"]["ce_id"] for entry in pending["outbox"]] == [f"{route.id}/{route.revision}"]


async def test_a_request_that_waits_in_an_outbox_is_kept_and_counts(lived: Lived) -> None:
    async with open_studio(lived.settings) as studio:
        asked, wrong, *_ = [d for d in await studio.deployments.where(ANYONE) if d.status == "ready"]
        for each in (asked, wrong):
            await studio.deployments.change("acme", each.id, lambda present: removal(present, CAUSE))
        live = (await documents(studio.store, Deployment.COLLECTION))["deployments"]
        changed = {**live[wrong.id], "status": "ready", "version": 50}
        await studio.store.replace(Deployment.COLLECTION, changed, live[wrong.id]["version"])
        outcomes = await replay(studio, "deployments")
        assert outcomes["deployments"] == Outcome(same=lived.deployments - 1, different=1)
        after = (await documents(studio.store, Deployment.COLLECTION))["deployments"]
        assert after[asked.id] == live[asked.id], "a record is right that is ahead of the journal"
        assert after[wrong.id] == {**live[wrong.id], "version": 51}, "repaired, and its event still waits"


async def test_topics_that_lack_something_are_completed_from_the_journal(lived: Lived) -> None:
    id = new_id("job")
    events = [envelope(fine_tune(id), id), envelope(FineTuneQueued(job_id=id, attempt=0), id)]
    events += [envelope(FineTuneProgressed(job_id=id, attempt=1, step=n), id, n) for n in (2, 3)]
    async with open_studio(lived.settings) as studio:
        await studio.store.journal([each.stored() for each in events])
        await studio.publisher.publish([outgoing(events[n].stored()) for n in (1, 3, 3)])
        await studio.publisher.publish([Outgoing("mini-studio.fine-tunes", b"k", b"no event", [])])
        assert (await replay(studio, "jobs", topics=True))["jobs"] == Outcome(same=lived.jobs, missing=1)
        made = await studio.jobs.get(ANYONE, id)
        assert made is not None
        assert made.document() == fold(Job, events).document()  # type: ignore[union-attr]


async def test_a_crash_in_the_middle_leaves_valid_records_and_is_made_good(
    lived: Lived, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "PAGE", 2)
    monkeypatch.setattr(replaying, "BATCH", 3)
    async with open_studio(lived.settings) as studio:
        before = contents(await documents(studio.store, Job.COLLECTION))["jobs"]
        await studio.store.clear(Job.COLLECTION)
        real, there = studio.store.put_all, set()
        for allowed in range(1, 100):
            left = iter(range(allowed))

            async def put_all(*change: Any, left: Any = left) -> list[bool]:
                if next(left, None) is None:
                    raise Unavailable("killed")
                return await real(*change)

            studio.store.put_all = put_all  # type: ignore[method-assign]
            try:
                await replay(studio, "jobs")
            except Unavailable:
                found = contents(await documents(studio.store, Job.COLLECTION))["jobs"]
                there.add(len(found))
                assert found.items() <= before.items()
            else:
                break
        assert contents(await documents(studio.store, Job.COLLECTION))["jobs"] == before
        assert len(there) > 2, "it was killed before, within and behind the swap"


async def test_two_at_once_do_not_spoil_each_other(lived: Lived) -> None:
    async with open_studio(lived.settings) as studio:
        job = new_id("job")
        mine = Shadow(studio.store, Job)
        await mine.fold([envelope(fine_tune(job), job)])
        real = studio.store.get_all

        async def before_the_other(*which: Any) -> dict[str, Document]:
            found = await real(*which)
            studio.store.get_all = real  # type: ignore[method-assign]
            await Shadow(studio.store, Job).fold([envelope(FineTuneQueued(job_id=job, attempt=0), job)])
            return found

        studio.store.get_all = before_the_other  # type: ignore[method-assign]
        with pytest.raises(Conflict):
            await mine.fold([envelope(FineTuneQueued(job_id=job, attempt=1), job)])
        assert (await replay(studio, "jobs"))["jobs"] == Outcome(same=lived.jobs), "the next one starts afresh"


async def test_a_name_that_another_one_took_meanwhile_is_in_the_way(lived: Lived) -> None:
    async with open_studio(lived.settings) as studio:
        lost, *_ = await studio.deployments.where(ANYONE)
        await take_away(studio.store, Deployment.COLLECTION, lost.id)
        id = new_id("dep")
        other = requested(Deployment, replace_name(deploy(id), lost.name), subject=id, client_code="", cause=CAUSE)
        await studio.deployments.insert(other)
        outcome = (await replay(studio, "deployments"))["deployments"]
        assert outcome == Outcome(same=lived.deployments, in_the_way=1)
        assert not replaying.right(outcome, swap=True)
        stolen, *_ = [d for d in await studio.store.scan(Deployment.COLLECTION, limit=10) if d["_id"] != id]
        changed = {**stolen, "name": "another", "version": 90}
        await studio.store.replace(Deployment.COLLECTION, changed, stolen["version"])
        await studio.store.insert(Deployment.COLLECTION, {**stolen, "_id": new_id("dep")})
        outcome = (await replay(studio, "deployments"))["deployments"]
        assert outcome == Outcome(same=lived.deployments - 1, in_the_way=2, unexplained=1)


def replace_name(event: Any, name: str) -> Any:
    return event.model_copy(update={"name": name})


async def test_it_runs_beside_a_live_studio(lived: Lived) -> None:
    ids: list[str] = []

    async def traffic(studio: Studio) -> None:
        for _ in range(40):
            id = new_id("job")
            await studio.jobs.insert(requested(Job, fine_tune(id), subject=id, client_code="acme", cause=CAUSE))
            ids.append(id)
            dep = new_id("dep")
            await studio.deployments.request("acme", deploy(dep), CAUSE)
            await asyncio.sleep(0.05)

    with running_broker() as bootstrap:
        kafka = lived.settings.kafka.model_copy(update={"bootstrap": bootstrap})
        settings = lived.settings.model_copy(update={"kafka": kafka})
        await refill_topics(settings, lambda done: None)
        await live_on(settings, traffic, ids, lived)


async def live_on(settings: Settings, traffic: Any, ids: list[str], lived: Lived) -> None:
    async with open_studio(settings, relayed=COLLECTIONS) as studio, consuming(studio), open_studio(settings) as beside:
        going = asyncio.create_task(traffic(studio))
        await studio.store.clear(RouteRecord.COLLECTION)
        rounds = 0
        while not going.done():
            await replay(beside, topics=rounds % 2 == 1)
            rounds += 1
        await going
        await eventually(lambda: quiet(studio))
        after = await replay(beside)
        assert after["jobs"] == Outcome(same=lived.jobs + len(ids))
        assert after["routes"] == Outcome(same=lived.deployments + len(ids))
        assert rounds > 1
        runs = studio.cluster.runs  # type: ignore[attr-defined]
        await eventually(lambda: submitted_all(runs, ids))
        assert {name for name in runs if name.split("-")[0] in ids} == {f"{id}-1" for id in ids}, "each once"


async def submitted_all(runs: dict[str, Any], ids: list[str]) -> bool:
    return all(f"{id}-1" in runs for id in ids)


async def test_shadows_are_nobodys_outbox() -> None:
    assert not {c.name for c in SHADOWS} & {c.name for c in COLLECTIONS}


async def test_the_command_says_what_it_found(lived: Lived) -> None:
    def command(*words: str) -> tuple[int, str]:
        environment = {**os.environ, "MINI_STUDIO_KAFKA__BOOTSTRAP": lived.settings.kafka.bootstrap}
        line = [sys.executable, "-m", "mini_studio.cli", "replay", *words, "--data", str(lived.settings.data)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = await asyncio.to_thread(command, "all", "--check")
    assert code == 0, said
    async with open_studio(lived.settings) as studio:
        await studio.store.clear(Job.COLLECTION)
    code, said = await asyncio.to_thread(command, "jobs", "--check", "--from", "topics")
    assert (code, f"{lived.jobs} missing" in said) == (1, True), said
    code, said = await asyncio.to_thread(command, "jobs")
    assert (code, f"{lived.jobs} missing" in said) == (0, True), said
