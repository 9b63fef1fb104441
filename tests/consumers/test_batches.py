"""Projections that take whole batches: one read and one write, and nothing lost where that is not enough."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from consumers import routes
from events.base import Envelope
from events.deployments import DeploymentReady
from events.fine_tuning import FineTuneProgressed, FineTuneStarted
from events.types import new_id
from mini_studio.records.jobs import Job
from mini_studio.records.projection import fold
from mini_studio.records.record import ANYONE
from mini_studio.records.store import Collection, Document
from mini_studio.settings import Settings
from mini_studio.wiring import Studio, open_studio
from tests.consumers.cases import deploy, envelope, fine_tune


@pytest.fixture
async def studio(tmp_path: Path) -> AsyncIterator[Studio]:
    """Its record store alone: nothing here needs a broker."""
    async with open_studio(Settings(data=tmp_path)) as studio:
        yield studio


def history(steps: int = 3) -> list[Envelope[Any]]:
    id = new_id("job")
    started = envelope(FineTuneStarted(job_id=id, attempt=1, submission_id="s"), id, 1)
    told = [envelope(FineTuneProgressed(job_id=id, attempt=1, step=n), id, 1 + n) for n in range(1, steps + 1)]
    return [envelope(fine_tune(id), id), started, *told]


def calls(studio: Studio, *methods: str) -> list[str]:
    """The list fills with the store's methods as they are called."""
    seen: list[str] = []
    for method in methods:
        real = getattr(studio.store, method)

        def noted(*args: Any, real: Any = real, method: str = method, **kwargs: Any) -> Any:
            seen.append(method)
            return real(*args, **kwargs)

        setattr(studio.store, method, noted)
    return seen


async def kept(studio: Studio, told: list[Envelope[Any]]) -> dict[str, Any]:
    job = await studio.jobs.get(ANYONE, told[0].subject)
    assert job is not None
    return job.model_dump(exclude={"outbox", "version"})


def folded(told: list[Envelope[Any]]) -> dict[str, Any]:
    job = fold(Job, told)
    assert job is not None
    return job.model_dump(exclude={"outbox", "version"})


async def test_a_batch_is_one_read_and_one_write(studio: Studio) -> None:
    histories = [history() for _ in range(20)]
    seen = calls(studio, "get", "get_all", "insert", "replace", "put_all")
    turns = [told[n] for n in range(5) for told in histories]
    await studio.jobs.apply_all(turns[:50])
    await studio.jobs.apply_all(turns[40:])
    assert seen == ["get_all", "put_all"] * 2
    await studio.jobs.apply_all(turns)
    assert seen == ["get_all", "put_all", "get_all", "put_all", "get_all"], "what is applied is not written again"
    for told in histories:
        assert await kept(studio, told) == folded(told)


async def test_a_record_that_changes_meanwhile_is_applied_to_again(studio: Studio) -> None:
    quiet, raced, made = history(), history(), history()
    await studio.jobs.apply_all([quiet[0], raced[0]])
    put_all = studio.store.put_all

    async def late(collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        studio.store.put_all = put_all  # type: ignore[method-assign]
        await studio.jobs.apply(raced[1])
        await studio.jobs.apply(made[0])
        return await put_all(collection, changes)

    studio.store.put_all = late  # type: ignore[method-assign]
    await studio.jobs.apply_all([*quiet[1:], *raced[1:], *made])
    for told in (quiet, raced, made):
        assert await kept(studio, told) == folded(told)


async def test_missing_events_come_from_the_journal(studio: Studio) -> None:
    whole, gap, headless = history(), history(), history()
    await studio.store.journal([e.stored() for told in (gap, headless) for e in told])
    await studio.jobs.apply_all(gap[:2])
    await studio.jobs.apply_all([*whole, *gap[4:], *headless[2:]])
    for told in (whole, gap, headless):
        assert await kept(studio, told) == folded(told)


async def test_routes_are_written_together_and_follow_a_change_in_between(studio: Studio) -> None:
    ids = [new_id("dep") for _ in range(3)]
    asked = [envelope(deploy(id), id) for id in ids]
    ready = [
        envelope(DeploymentReady(deployment_id=id, generation=1, name=deploy(id).name, endpoints=["http://x"], replicas=1), id)
        for id in ids
    ]  # fmt: skip
    await routes.project(asked, studio)
    put_all = studio.store.put_all

    async def late(collection: Collection, changes: Sequence[tuple[Document, int | None]]) -> list[bool]:
        if collection is studio.routes.collection:
            first = await studio.routes.get(ANYONE, ids[0])
            assert first is not None
            await studio.store.replace(collection, {**first.document(), "version": first.version + 1}, first.version)
        return await put_all(collection, changes)

    studio.store.put_all = late  # type: ignore[method-assign]
    await routes.project(ready, studio)
    studio.store.put_all = put_all  # type: ignore[method-assign]
    for id in ids:
        record = await studio.routes.get(ANYONE, id)
        assert record is not None
        assert record.route is not None
        assert (record.route.endpoints, record.revision, len(record.outbox)) == (["http://x"], 2, 2)
    seen = calls(studio, "put_all", "replace", "insert")
    await routes.project([*asked, *ready], studio)
    assert seen == [], "the second time nothing is written"
