"""Consumer `datasets`: reads both stored copies of an upload back, and profiles it; removes those of a deleted one."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import structlog

from consumers.watchers import turn
from events.base import Envelope
from events.datasets import DatasetDeleted, DatasetProfiled, DatasetUploaded
from mini_studio.bus.consumer import Consumer
from mini_studio.errors import NotFound
from mini_studio.ingest import PREFIX, key_of, orphans
from mini_studio.records.datasets import DatasetProfile
from mini_studio.records.projection import timestamp
from mini_studio.records.record import ANYONE
from mini_studio.records.store import DuplicateRecord
from mini_studio.wiring import Studio

log = structlog.get_logger(__name__)

# One at a time: each may be gigabytes to read, twice, and a batch must not outlast the longest time between two polls.
consumer = Consumer("datasets", max_records=1, longest_s=1800.0)
CHARACTERS_PER_TOKEN = 4
"""OpenAI's rule of thumb for English; a job reports the exact count of its own tokenizer."""
SWEEP_EVERY_S = 600.0


@consumer.service
async def sweep(studio: Studio) -> None:
    """Now and then delete stored bytes whose record was never written (a crash between the two), and halves of uploads."""

    async def look() -> float:
        older_than_s = studio.settings.uploads.sweep_after_s
        async for key in orphans(studio.dfs, older_than_s, partial(recorded, studio)):
            await studio.intake.forget(key)
            log.info("datasets.swept", location=studio.dfs.location(key))
        for name, store in (("shared file system", studio.dfs), ("S3", await studio.load_s3())):
            if swept := await store.sweep(PREFIX, older_than_s):
                log.info("datasets.unfinished_swept", store=name, uploads=swept)
        return SWEEP_EVERY_S

    await turn(look, asyncio.Event())


async def recorded(studio: Studio, key: str) -> bool:
    """Whether a record names the blob, by path or by URI: a moved data folder changes the one, a renamed bucket the other.

    That of a deleted dataset does not count: should `remove` have failed for good, the sweep takes its bytes.
    """
    found = await studio.datasets.where(ANYONE, limit=1, dfs_path=studio.dfs.location(key))
    found = found or await studio.datasets.where(ANYONE, limit=1, s3_uri=studio.s3.location(key))
    return bool(found) and not found[0].deleted


@consumer.on(DatasetUploaded)
async def profile(envelope: Envelope[DatasetUploaded], studio: Studio) -> None:
    """Compare both copies with what was received, and publish what is in them."""
    await studio.datasets.apply(envelope)
    if await studio.profiles.get(ANYONE, envelope.subject) is not None:
        return
    event = await examine(envelope, studio)
    try:
        await studio.profiles.insert(profile_of(envelope).deciding(event))
    except DuplicateRecord:
        return


def profile_of(envelope: Envelope[Any]) -> DatasetProfile:
    """A new one, of which nothing is decided."""
    return DatasetProfile(
        id=envelope.subject,
        client_code=envelope.client_code,
        created_at=timestamp(envelope.time),
        cause=envelope.follows(),
    )


@consumer.on(DatasetProfiled)
async def project(envelope: Envelope[DatasetProfiled], studio: Studio) -> None:
    """Show the profile in the dataset's record."""
    await studio.datasets.apply(envelope)


@consumer.on(DatasetDeleted)
async def remove(envelope: Envelope[DatasetDeleted], studio: Studio) -> None:
    """Remove both copies, and take note of it: an upload that is read after this is not profiled any more."""
    await studio.datasets.apply(envelope)
    known = await studio.profiles.get(ANYONE, envelope.subject)
    if known is not None and known.removed:
        return
    await studio.load_s3()
    await studio.intake.forget(key_of(envelope.data.dfs_path))
    with contextlib.suppress(DuplicateRecord):
        await studio.profiles.insert(profile_of(envelope).model_copy(update={"removed": True}))
    await studio.profiles.change(
        ANYONE,
        envelope.subject,
        lambda profile: None if profile.removed else profile.model_copy(update={"removed": True}),
    )


async def examine(envelope: Envelope[DatasetUploaded], studio: Studio) -> DatasetProfiled:
    """Read both copies once."""
    uploaded = envelope.data
    key = key_of(uploaded.dfs_path)
    damaged = []
    for name, store in (("shared file system", studio.dfs), ("S3", await studio.load_s3())):
        if await digest(store.read(key)) != uploaded.sha256:
            damaged.append(f"the copy on {name} ({store.location(key)}) is missing or not what was uploaded")
    message = "; ".join(damaged) + ": upload the dataset again." if damaged else None
    return DatasetProfiled(
        dataset_id=uploaded.dataset_id,
        state="damaged" if damaged else "verified",
        message=message,
        rows=uploaded.rows,
        characters=uploaded.characters,
        longest_line_bytes=uploaded.longest_line_bytes,
        tokens_estimated=-(-uploaded.characters // CHARACTERS_PER_TOKEN),
    )


async def digest(chunks: AsyncIterator[bytes]) -> str | None:
    """SHA-256 of a stored copy; None when it is not there."""
    sha256 = hashlib.sha256()
    try:
        async for chunk in chunks:
            await asyncio.to_thread(sha256.update, chunk)
    except NotFound:
        return None
    return sha256.hexdigest()
