"""The blob store contract: on the shared file system, on the embedded S3 server and on a real one."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mini_studio.drivers.dfs import DfsStore
from mini_studio.drivers.ports import BlobStore
from mini_studio.drivers.s3 import S3Store
from mini_studio.errors import Invalid, NotFound, TooLarge
from mini_studio.ingest import DatasetIntake, orphans
from mini_studio.settings import S3, Uploads

KEY = "datasets/ds_1.jsonl"
MIB = 1024 * 1024
WRITER = """
import asyncio, sys
from mini_studio.drivers.dfs import DfsStore
from mini_studio.drivers.s3 import S3Store
from mini_studio.settings import Settings

async def write():
    settings = Settings()
    store = S3Store(settings.s3) if sys.argv[1] == "s3" else DfsStore(settings.dfs)
    async with store.writer("datasets/killed.jsonl") as writer:
        for _ in range(30):
            await writer.write(bytes(2**20))
        print("half", flush=True)
        await asyncio.sleep(60)

asyncio.run(write())
"""


@pytest.fixture
async def s3(s3_settings: S3) -> AsyncIterator[S3Store]:
    store = S3Store(s3_settings)
    await store.ensure_bucket()
    await store.ensure_bucket()
    yield store
    for key in [key async for key, _, _ in store.list("")]:
        await store.delete(key)
    await store.aclose()


@pytest.fixture(params=["dfs", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Store) -> BlobStore:
    return s3 if request.param == "s3" else DfsStore(tmp_path)


async def content(store: BlobStore, key: str = KEY) -> bytes:
    return b"".join([chunk async for chunk in store.read(key)])


async def keys(store: BlobStore) -> list[str]:
    return [key async for key, _, _ in store.list("")]


@pytest.mark.parametrize("size", [0, 1, 3 * MIB, 20 * MIB + 7])
async def test_reads_what_was_written(store: BlobStore, size: int) -> None:
    sent = bytes(range(256)) * (size // 256 + 1)
    async with store.writer(KEY) as writer:
        for start in range(0, size, MIB):
            await writer.write(sent[start : min(size, start + MIB)])
    assert await content(store) == sent[:size]
    assert [(key, found) async for key, found, _ in store.list("datasets/")] == [(KEY, size)]


@pytest.mark.parametrize("size", [10, 20 * MIB])
async def test_an_error_leaves_nothing(store: BlobStore, size: int) -> None:
    with pytest.raises(RuntimeError):
        async with store.writer(KEY) as writer:
            await writer.write(b"x" * size)
            raise RuntimeError
    assert await keys(store) == []
    with pytest.raises(NotFound):
        await content(store)


async def test_what_a_killed_writer_left_is_swept(store: BlobStore, s3_settings: S3, tmp_path: Path) -> None:
    async with store.writer("datasets/other.jsonl") as writer:
        await writer.write(b"whole")
    kind = "s3" if isinstance(store, S3Store) else "dfs"
    assert s3_settings.secret_key is not None
    environment = {
        **os.environ,
        "MINI_STUDIO_DFS_ROOT": str(tmp_path),
        "MINI_STUDIO_S3__ENDPOINT": str(s3_settings.endpoint),
        "MINI_STUDIO_S3__REGION": s3_settings.region,
        "MINI_STUDIO_S3__ACCESS_KEY": str(s3_settings.access_key),
        "MINI_STUDIO_S3__SECRET_KEY": s3_settings.secret_key.get_secret_value(),
    }
    child = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", WRITER, kind], env=environment, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    child.kill()
    child.wait()
    assert await keys(store) == ["datasets/other.jsonl"]
    assert await store.sweep("datasets/", 3600) == 0, "it may still be written"
    assert await store.sweep("elsewhere/", 0) == 0, "others may use the store too"
    assert [await store.sweep("datasets/", 0) for _ in range(2)] == [1, 0]
    assert await keys(store) == ["datasets/other.jsonl"]


async def test_deleting_what_is_not_there_is_fine(store: BlobStore) -> None:
    await store.delete(KEY)


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../b", "a\0b", ""])
async def test_keys_stay_below_the_root(tmp_path: Path, key: str) -> None:
    with pytest.raises(Invalid):
        DfsStore(tmp_path).location(key)


ROW = b'{"prompt": "a", "completion": "b"}\n'


def intake(tmp_path: Path, s3: S3Store, **limits: int) -> tuple[DatasetIntake, DfsStore]:
    dfs = DfsStore(tmp_path)
    return DatasetIntake(dfs, s3, Uploads(**limits)), dfs


async def test_an_upload_lies_in_both_stores(tmp_path: Path, s3: S3Store) -> None:
    uploads, dfs = intake(tmp_path, s3)
    async with uploads.receive("ds_2") as upload:
        for _ in range(100):
            await upload.write(ROW * 1000)
        summary = await upload.finish()
    assert summary.rows == 100_000
    assert await content(dfs, upload.key) == await content(s3, upload.key) == ROW * 100_000


@pytest.mark.parametrize(
    ("sent", "limits", "error"),
    [(ROW + b"x\n", {}, Invalid), (b"", {}, Invalid), (ROW * 100, {"max_bytes": 1000}, TooLarge)],
)
async def test_a_refused_upload_leaves_nothing(
    tmp_path: Path, s3: S3Store, sent: bytes, limits: dict[str, int], error: type[Exception]
) -> None:
    uploads, dfs = intake(tmp_path, s3, **limits)
    with pytest.raises(error):
        async with uploads.receive("ds_3") as upload:
            await upload.write(sent)
            await upload.finish()
    assert await keys(dfs) == await keys(s3) == []


async def test_the_sweep_takes_only_what_no_record_names(tmp_path: Path, s3: S3Store) -> None:
    uploads, dfs = intake(tmp_path, s3)
    for id in ("ds_4", "ds_5"):
        async with uploads.receive(id) as upload:
            await upload.write(ROW)
            await upload.finish()

    async def known(key: str) -> bool:
        return "ds_4" in key

    assert [key async for key in orphans(dfs, 3600, known)] == [], "young bytes may still get their record"
    async for key in orphans(dfs, 0, known):
        await uploads.forget(key)
    assert await keys(dfs) == await keys(s3) == ["datasets/ds_4.jsonl"]
