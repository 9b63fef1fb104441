"""Takes a dataset's bytes in: each block is checked and goes to both stores at once; nothing is spooled or held."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from mini_studio.drivers.ports import BlobStore, BlobWriter
from mini_studio.errors import Invalid, TooLarge
from mini_studio.settings import Uploads
from schemas.training_data import DatasetSummary, InvalidDataset, LineValidator

BLOCK = 1024 * 1024
PREFIX = "datasets/"


def key_of(location: str) -> str:
    """The blob key behind a stored dataset's DFS path or S3 URI."""
    return PREFIX + location.rpartition("/")[2]


class Intake:
    """One upload in progress."""

    def __init__(
        self, id: str, limits: Uploads, writers: tuple[BlobWriter, ...], discard: Callable[[str], Awaitable[None]]
    ) -> None:
        self.id = id
        self.key = f"{PREFIX}{id}.jsonl"
        self._limits = limits
        self._writers = writers
        self._discard = discard
        self._validator = LineValidator(
            max_line_bytes=limits.max_line_bytes, max_depth=limits.max_depth, max_errors=limits.max_errors
        )
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._received = 0
        self._working: asyncio.Task[None] | None = None
        self._summary: DatasetSummary | None = None

    @property
    def summary(self) -> DatasetSummary:
        """What was received; after `finish`."""
        if self._summary is None:
            raise RuntimeError("the upload is not finished")
        return self._summary

    async def write(self, chunk: bytes) -> None:
        """Take bytes; waits while the block before is still on its way. Raises `Invalid` or `TooLarge`."""
        self._received += len(chunk)
        if self._received > self._limits.max_bytes:
            raise TooLarge(f"file: larger than {self._limits.max_bytes} bytes (MINI_STUDIO_UPLOADS__MAX_BYTES)")
        self._held.append(chunk)
        self._held_bytes += len(chunk)
        if self._held_bytes >= BLOCK:
            await self._pass_on()

    async def finish(self) -> DatasetSummary:
        """All bytes were written: the summary, or `Invalid` with the first errors by line."""
        if self._held:
            await self._pass_on()
        await self._done()
        with dataset_errors():
            self._summary = await asyncio.to_thread(self._validator.finish)
        return self._summary

    async def discard(self) -> None:
        """Delete the stored bytes again: no record will name them."""
        await self._discard(self.key)

    async def aclose(self) -> None:
        if self._working is not None:
            self._working.cancel()
            await asyncio.gather(self._working, return_exceptions=True)

    async def _pass_on(self) -> None:
        await self._done()
        self._working = asyncio.create_task(self._take(self._held))
        self._held, self._held_bytes = [], 0

    async def _done(self) -> None:
        working, self._working = self._working, None
        if working is not None:
            with dataset_errors():
                await working

    async def _take(self, chunks: list[bytes]) -> None:
        block = await asyncio.to_thread(b"".join, chunks)
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(self._validator.feed, block))
            for writer in self._writers:
                group.create_task(writer.write(block))


@contextlib.contextmanager
def dataset_errors() -> Iterator[None]:
    """Turn line errors, also from inside a task group, into one `Invalid`."""
    try:
        yield
    except InvalidDataset as error:
        raise invalid(error) from None
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        raise (invalid(first) if isinstance(first, InvalidDataset) else first) from None


def invalid(error: InvalidDataset) -> Invalid:
    """An `Invalid` that names the lines."""
    details = [{"line": e.line, "field": e.field, "message": e.message} for e in error.errors]
    texts = [f"line {e.line}: {e.field + ': ' if e.field else ''}{e.message}" for e in error.errors]
    more = f" (and {len(texts) - 3} more, see details)" if len(texts) > 3 else ""
    return Invalid("file: " + "; ".join(texts[:3]) + more, details=details)


class DatasetIntake:
    """Receives uploads into both stores."""

    def __init__(self, dfs: BlobStore, s3: BlobStore, limits: Uploads) -> None:
        self._dfs = dfs
        self._s3 = s3
        self._limits = limits

    @contextlib.asynccontextmanager
    async def receive(self, id: str) -> AsyncIterator[Intake]:
        """An upload under an id of its own. If the context fails, neither store keeps anything of it."""
        key = f"{PREFIX}{id}.jsonl"
        try:
            # The shared file system commits first, see `forget`.
            async with self._s3.writer(key) as s3, self._dfs.writer(key) as dfs:
                intake = Intake(id, self._limits, (dfs, s3), self._discard)
                try:
                    yield intake
                finally:
                    await intake.aclose()
        except BaseException:
            # One store may have committed before the other failed.
            await asyncio.shield(self._discard(key))
            raise

    async def forget(self, key: str) -> None:
        """Delete from S3, then from the shared file system: what is on S3 always has a copy that `orphans` finds."""
        await self._s3.delete(key)
        await self._dfs.delete(key)

    async def _discard(self, key: str) -> None:
        """Forget as far as the stores answer; the sweep takes the rest."""
        with contextlib.suppress(Exception):
            await self.forget(key)


async def orphans(dfs: BlobStore, older_than_s: float, known: Callable[[str], Awaitable[bool]]) -> AsyncIterator[str]:
    """Keys of stored datasets that are old and that no record names (`known` is asked by key)."""
    oldest = time.time() - older_than_s
    async for key, _, modified in dfs.list(PREFIX):
        if modified < oldest and not await known(key):
            yield key
