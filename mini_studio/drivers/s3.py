"""S3: the only module that knows aioboto3."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from typing import Any

import aioboto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from mini_studio.errors import NotFound, Unavailable
from mini_studio.settings import S3

PART = 8 * 1024 * 1024
"""Least bytes of a multipart part; S3's minimum is 5 MiB."""
PARTS_IN_FLIGHT = 2
CHUNK = 1024 * 1024
MISSING = frozenset(("NoSuchKey", "404", "NotFound"))


class S3Writer:
    """Buffers up to a part, then uploads parts in the background, a bounded number at a time."""

    def __init__(self, client: Any, bucket: str, key: str) -> None:
        self._client = client
        self._place = {"Bucket": bucket, "Key": key}
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._upload_id: str | None = None
        self._parts: list[asyncio.Task[dict[str, Any]]] = []
        self._slots = asyncio.Semaphore(PARTS_IN_FLIGHT)

    async def write(self, chunk: bytes) -> None:
        self._held.append(chunk)
        self._held_bytes += len(chunk)
        if self._held_bytes >= PART:
            with _outages():
                await self._send(await self._taken())

    async def commit(self) -> None:
        with _outages():
            if self._upload_id is None:
                await self._client.put_object(**self._place, Body=await self._taken())
                return
            if self._held:
                await self._send(await self._taken())
            parts = await asyncio.gather(*self._parts)
            await self._client.complete_multipart_upload(
                **self._place, UploadId=self._upload_id, MultipartUpload={"Parts": list(parts)}
            )

    async def abort(self) -> None:
        """Leave no orphan parts behind."""
        for task in self._parts:
            task.cancel()
        await asyncio.gather(*self._parts, return_exceptions=True)
        if self._upload_id is not None:
            with contextlib.suppress(ClientError, BotoCoreError):
                await self._client.abort_multipart_upload(**self._place, UploadId=self._upload_id)

    async def _taken(self) -> io.BytesIO:
        """What is held, joined in a thread, as the only reference to its bytes: the client would copy what others hold too."""
        held = self._held
        self._held, self._held_bytes = [], 0
        return await asyncio.to_thread(lambda: io.BytesIO(b"".join(held)))

    async def _send(self, part: io.BytesIO) -> None:
        if self._upload_id is None:
            self._upload_id = (await self._client.create_multipart_upload(**self._place))["UploadId"]
        await self._slots.acquire()
        done = [task for task in self._parts if task.done()]
        for task in done:
            task.result()  # a part that failed ends the upload now, not at its end
        self._parts.append(asyncio.create_task(self._upload(len(self._parts) + 1, part)))

    async def _upload(self, number: int, part: io.BytesIO) -> dict[str, Any]:
        try:
            answer = await self._client.upload_part(
                **self._place, UploadId=self._upload_id, PartNumber=number, Body=part
            )
        finally:
            self._slots.release()
        return {"PartNumber": number, "ETag": answer["ETag"]}


class S3Store:
    """Implements `BlobStore` on one bucket. The client opens on first use."""

    def __init__(self, settings: S3) -> None:
        self._settings = settings
        self._stack = contextlib.AsyncExitStack()
        self._opening = asyncio.Lock()
        self._client: Any = None

    def location(self, key: str) -> str:
        return f"s3://{self._settings.bucket}/{key}"

    async def ensure_bucket(self) -> None:
        """Create the bucket where it is missing."""
        client = await self._opened()
        with _outages():
            try:
                await client.head_bucket(Bucket=self._settings.bucket)
            except ClientError as error:
                if _code(error) not in MISSING | {"NoSuchBucket"}:
                    raise
                await client.create_bucket(Bucket=self._settings.bucket)

    @contextlib.asynccontextmanager
    async def writer(self, key: str) -> AsyncIterator[S3Writer]:
        writer = S3Writer(await self._opened(), self._settings.bucket, key)
        try:
            yield writer
            await writer.commit()
        except BaseException:
            await asyncio.shield(writer.abort())
            raise

    async def read(self, key: str) -> AsyncIterator[bytes]:
        client = await self._opened()
        with _outages(key):
            answer = await client.get_object(Bucket=self._settings.bucket, Key=key)
            body = answer["Body"]
            try:
                async for chunk in body.iter_chunks(CHUNK):
                    yield chunk
            finally:
                body.close()

    async def delete(self, key: str) -> None:
        client = await self._opened()
        with _outages(), contextlib.suppress(NotFound):
            await client.delete_object(Bucket=self._settings.bucket, Key=key)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        client = await self._opened()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._settings.bucket, Prefix=prefix)
        with _outages():
            async for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"], entry["Size"], entry["LastModified"].timestamp()

    async def aclose(self) -> None:
        await self._stack.aclose()

    async def _opened(self) -> Any:
        async with self._opening:
            if self._client is None:
                settings = self._settings
                config = Config(
                    signature_version="s3v4",
                    s3={"addressing_style": "path", "payload_signing_enabled": False},
                    connect_timeout=3,
                    read_timeout=60,
                    retries={"max_attempts": 2},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                )
                client = aioboto3.Session().client(
                    "s3",
                    endpoint_url=settings.endpoint or None,
                    region_name=settings.region,
                    aws_access_key_id=settings.access_key,
                    aws_secret_access_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
                    config=config,
                )
                self._client = await self._stack.enter_async_context(client)
            return self._client


@contextlib.contextmanager
def _outages(key: str = "") -> Any:
    """Turn the client's errors into ours."""
    try:
        yield
    except ClientError as error:
        if _code(error) in MISSING:
            raise NotFound(f"there is no {key} in S3") from None
        raise Unavailable(f"S3 refused: {error}") from error
    except (BotoCoreError, OSError, TimeoutError) as error:
        raise Unavailable(f"S3 is away: {error}") from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
