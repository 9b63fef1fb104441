"""The records of a studio that has lived, moved between stores: the same documents after, whatever interrupts it."""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from events.base import Cause
from mini_studio import migrating
from mini_studio.errors import Conflict, Invalid
from mini_studio.records.idempotency import fingerprint
from mini_studio.records.jobs import Job
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.records.shadow import content
from mini_studio.records.store import Document, RecordStore
from mini_studio.records.training_runs import TrainingRun
from mini_studio.settings import Records, Settings
from mini_studio.wiring import COLLECTIONS, open_studio, record_store
from tests.replay.conftest import Lived

pytestmark = pytest.mark.asyncio(loop_scope="session")

AT = "2026-01-01T00:00:00.000000Z"


@pytest.fixture(params=["sqlite", pytest.param("mongo", marks=pytest.mark.real)])
def target(request: pytest.FixtureRequest, lived: Lived, tmp_path: Path) -> Settings:
    """The studio's settings with its records elsewhere."""
    if request.param == "sqlite":
        records = Records(sqlite=tmp_path / "moved.sqlite")
    else:
        url = SecretStr(request.getfixturevalue("mongo_url"))
        records = Records(mongo_url=url, mongo_database=request.getfixturevalue("mongo_database"))
    return lived.settings.model_copy(update={"records": records})


async def migrate(source: Settings, target: Settings) -> tuple[bool, list[str]]:
    """Whether the stores hold the same, and what was said."""
    said: list[str] = []
    records = source.records
    place = records.mongo_url.get_secret_value() if records.mongo_url else str(source.record_file)
    return await migrating.run(target, place, records.mongo_database, said.append), said


async def everything(settings: Settings) -> tuple[dict[str, dict[str, Document]], list[dict[str, Any]]]:
    """All documents by collection and id, and the journal."""
    async with open_studio(settings) as studio:
        found = {
            c.name: {document["_id"]: document for document in await studio.store.scan(c, limit=10_000)}
            for c in COLLECTIONS
        }
        return found, [entry.stored for entry in await studio.store.read_journal(limit=100_000)]


def contents(found: dict[str, dict[str, Document]]) -> dict[str, dict[str, Any]]:
    return {name: {id: content(document) for id, document in those.items()} for name, those in found.items()}


async def test_all_is_the_same_after(lived: Lived, target: Settings) -> None:
    async with open_studio(lived.settings) as studio:
        cause = Cause(correlation_id="c")
        await studio.keys.claim("acme", "submit", "key", fingerprint("body"), cause=cause, at=AT)
    before, journal = await everything(lived.settings)
    assert all(before.values()), "there is something of every kind"
    right, said = await migrate(lived.settings, target)
    assert right
    assert f"jobs: {lived.jobs} identical" in said
    assert said[-1] == f"journal: {len(journal):,} events identical, in the same order"
    after, moved = await everything(target)
    assert contents(after) == contents(before)
    assert moved == journal
    for copied in migrating.COPIED:
        assert after[copied.name] == before[copied.name], "with their versions, which count their changes"
    async with open_studio(target) as studio:
        assert await studio.store.pending(COLLECTIONS, 10) == [], "nothing is published again"
    assert await everything(lived.settings) == (before, journal), "the source was only read"


async def test_again_changes_nothing_and_brings_what_is_new(lived: Lived, target: Settings) -> None:
    await migrate(lived.settings, target)
    first = await everything(target)
    assert (await migrate(lived.settings, target))[0]
    assert await everything(target) == first
    async with open_studio(lived.settings) as studio:
        (run, *_) = await studio.runs.where(ANYONE)
        await studio.runs.change(ANYONE, run.id, lambda r: r.model_copy(update={"reported_bytes": 10**6}))
    assert (await migrate(lived.settings, target))[0]
    assert contents((await everything(target))[0]) == contents((await everything(lived.settings))[0])


async def test_there_and_back(lived: Lived, target: Settings, tmp_path: Path) -> None:
    await migrate(lived.settings, target)
    back = lived.settings.model_copy(update={"records": Records(sqlite=tmp_path / "back.sqlite")})
    assert (await migrate(target, back))[0]
    before, journal = await everything(lived.settings)
    after, moved = await everything(back)
    assert (contents(after), moved) == (contents(before), journal)


class Interrupted(Exception):
    """The process ends here."""


class Fuse:
    """Ends the process at the `at`th call, before or after what it does."""

    def __init__(self, real: Callable[..., Awaitable[Any]], at: int, *, before: bool) -> None:
        self.calls = 0
        self._real, self._at, self._before = real, at, before

    async def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self._at and self._before:
            raise Interrupted
        result = await self._real(*arguments, **options)
        if self.calls == self._at:
            raise Interrupted
        return result


@pytest.mark.parametrize("step", ["journal", "put_all", "settle", "get_all"])
async def test_an_interrupted_one_goes_on(
    step: str, lived: Lived, target: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each goes a little further than the one before it."""
    monkeypatch.setattr(migrating, "BATCH", 7)
    source = record_store(lived.settings)
    interrupted = 0
    for at in range(1, 12):
        async with open_studio(target) as studio:
            fuse = Fuse(getattr(studio.store, step), at, before=bool(at % 2))
            setattr(studio.store, step, fuse)
            try:
                await migrating.migrate(source, studio, lambda text: None)
            except Interrupted:
                interrupted += 1
    await source.aclose()
    assert interrupted
    assert (await migrate(lived.settings, target))[0]
    assert contents((await everything(target))[0]) == contents((await everything(lived.settings))[0])


async def test_what_waits_to_be_published_is_refused(lived: Lived, target: Settings) -> None:
    async with open_studio(lived.settings) as studio:
        (job, *_) = await studio.jobs.where(ANYONE)
        entry = {"topic": "t", "key": job.id, "headers": {"ce_id": "e", "ce_time": AT}, "value": "{}"}
        await studio.jobs.change(ANYONE, job.id, lambda j: j.model_copy(update={"outbox": (entry,)}))
    with pytest.raises(Conflict, match=rf"not on the log yet, in jobs/{job.id}: .*mini-studio relay.*stop it"):
        await migrate(lived.settings, target)
    found, journal = await everything(target)
    assert not any(found.values())
    assert not journal


async def other_event(store: RecordStore) -> None:
    await store.journal([{"topic": "t", "key": "k", "headers": {"ce_id": "foreign"}, "value": "{}"}])


async def other_record(store: RecordStore) -> None:
    await store.insert(Job.COLLECTION, {"_id": "x", "version": 1, "outbox": [], "client_code": "a", "created_at": AT})


async def newer_run(store: RecordStore) -> None:
    (run, *_) = await store.scan(TrainingRun.COLLECTION, limit=1)
    assert await store.replace(
        TrainingRun.COLLECTION, {**run, "version": run["version"] + 1, "attempt": 9}, run["version"]
    )


@pytest.mark.parametrize("lives_on", [other_event, other_record, newer_run])
async def test_a_target_with_a_life_of_its_own_is_left_alone(
    lives_on: Callable[[RecordStore], Awaitable[None]], lived: Lived, target: Settings
) -> None:
    if lives_on is newer_run:
        await migrate(lived.settings, target)
    async with open_studio(target) as studio:
        await studio.store.prepare()
        await lives_on(studio.store)
    before = await everything(target)
    with pytest.raises(Conflict, match="name an empty place"):
        await migrate(lived.settings, target)
    assert await everything(target) == before


async def test_a_record_that_no_event_explains_is_named(lived: Lived, target: Settings) -> None:
    async with open_studio(lived.settings) as studio:
        (job, *_) = await studio.store.scan(Job.COLLECTION, limit=1)
        await studio.store.insert(Job.COLLECTION, {**job, "_id": "job_made_up"})
    right, said = await migrate(lived.settings, target)
    assert not right
    assert any("1 of" in line and "DIFFER (job_made_up)" in line for line in said)


async def test_a_source_that_is_written_meanwhile_is_noticed(
    lived: Lived, target: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = migrating._settle_routes

    async def written_meanwhile(store: RecordStore) -> None:
        await real(store)
        async with open_studio(lived.settings) as studio:
            (release, *_) = await studio.releases.where(ANYONE)
            await studio.releases.change(ANYONE, release.id, lambda r: r.model_copy(update={"message": "news"}))

    monkeypatch.setattr(migrating, "_settle_routes", written_meanwhile)
    right, said = await migrate(lived.settings, target)
    assert not right
    assert any(line.startswith(f"{Release.COLLECTION.name}: 1 of") for line in said)


async def test_the_same_place_or_no_place_is_refused(lived: Lived, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="there already"):
        await migrate(lived.settings, lived.settings)
    with pytest.raises(Invalid, match="no file"):
        await migrating.run(lived.settings, str(tmp_path / "nothing.sqlite"), "", print)
    assert not (tmp_path / "nothing.sqlite").exists()


def command(source: Settings, target: Settings) -> tuple[list[str], dict[str, str]]:
    records = target.records
    environment = {
        **os.environ,
        "MINI_STUDIO_DATA": str(target.data),
        "MINI_STUDIO_MIGRATE_FROM": str(source.record_file),
    }
    if records.mongo_url:
        environment["MINI_STUDIO_RECORDS__MONGO_URL"] = records.mongo_url.get_secret_value()
        environment["MINI_STUDIO_RECORDS__MONGO_DATABASE"] = records.mongo_database
    else:
        environment["MINI_STUDIO_RECORDS__SQLITE"] = str(records.sqlite)
    return [sys.executable, "-m", "mini_studio.cli", "records", "migrate"], environment


async def test_the_command_is_killed_and_run_again(lived: Lived, target: Settings) -> None:
    arguments, environment = command(lived.settings, target)
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=asyncio.subprocess.DEVNULL)
        await asyncio.sleep(random.uniform(1, 3))
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    done = await asyncio.to_thread(
        subprocess.run, arguments, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "done: the stores hold the same" in done.stdout
    assert contents((await everything(target))[0]) == contents((await everything(lived.settings))[0])
    async with open_studio(target) as studio:
        await other_event(studio.store)
    refused = await asyncio.to_thread(
        subprocess.run, arguments, env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "name an empty place" in refused.stderr
