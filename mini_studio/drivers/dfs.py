"""The shared file system: a folder on this machine, or a mounted volume."""

import asyncio
import contextlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO

from mini_studio.errors import Invalid, NotFound, Unavailable

CHUNK = 1024 * 1024
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}(/[A-Za-z0-9][A-Za-z0-9._-]{0,200}){0,8}")
PARTIAL = ".partial-"
"""Prefix of files that are being written."""
LISTED = 500
"""Files that are looked at in one go."""


class DfsWriter:
    """Writes in a thread, so a slow disk holds up nobody else."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def write(self, chunk: bytes) -> None:
        try:
            await asyncio.to_thread(self._file.write, chunk)
        except OSError as error:
            raise _refused(error) from error


class DfsStore:
    """Implements `BlobStore`. A blob appears under its key by an atomic rename after it is on the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def location(self, key: str) -> str:
        return str(self._path(key))

    @contextlib.asynccontextmanager
    async def writer(self, key: str) -> AsyncIterator[DfsWriter]:
        path = self._path(key)
        file = await asyncio.to_thread(_open_partial, path)
        try:
            yield DfsWriter(file)
            await asyncio.to_thread(_commit, file, path)
        except BaseException:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise

    async def read(self, key: str) -> AsyncIterator[bytes]:
        try:
            file = await asyncio.to_thread(self._path(key).open, "rb")
        except FileNotFoundError:
            raise NotFound(f"there is no {key} on the shared file system") from None
        with file:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                yield chunk

    async def delete(self, key: str) -> None:
        await asyncio.to_thread(self._path(key).unlink, missing_ok=True)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        async for key, size, modified in self._files(prefix):
            if not Path(key).name.startswith(PARTIAL):
                yield key, size, modified

    async def sweep(self, prefix: str, older_than_s: float) -> int:
        swept, oldest = 0, time.time() - older_than_s
        async for key, _, modified in self._files(prefix):
            if Path(key).name.startswith(PARTIAL) and modified < oldest:
                await asyncio.to_thread((self._root / key).unlink, missing_ok=True)
                swept += 1
        return swept

    async def _files(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        """A few at a time: what is stored may be more than should be held in memory, and a slow disk holds up nobody else."""
        entries = _files(str(self._root))
        while some := await asyncio.to_thread(lambda: list(itertools.islice(entries, LISTED))):
            for path, found in some:
                key = os.path.relpath(path, self._root)
                if key.startswith(prefix):
                    yield key, found.st_size, found.st_mtime

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise Invalid(f"not a blob key: {key[:100]!r}")
        return self._root / key


def _files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """All below the folder, each folder's in any order."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            elif entry.is_file():
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path, entry.stat()


def _open_partial(path: Path) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.NamedTemporaryFile(dir=path.parent, prefix=PARTIAL, delete=False)  # type: ignore[return-value]
    except OSError as error:
        raise _refused(error) from error


def _commit(file: BinaryIO, path: Path) -> None:
    try:
        file.flush()
        os.fsync(file.fileno())
        file.close()
        Path(file.name).replace(path)
    except OSError as error:
        raise _refused(error) from error


def _refused(error: OSError) -> Unavailable:
    return Unavailable(f"the shared file system refused a write: {error.strerror}; check its free space and rights")
