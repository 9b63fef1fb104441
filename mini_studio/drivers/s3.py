"""S3: the only module that knows aioboto3."""

import asyncio
import base64
import contextlib
import io
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aioboto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, SSLError

from mini_studio.errors import NotFound, Unavailable
from mini_studio.settings import S3

PART = 8 * 1024 * 1024
"""Least bytes of a multipart part; S3's minimum is 5 MiB."""
PARTS_IN_FLIGHT = 2
CHUNK = 1024 * 1024
MISSING = frozenset(("NoSuchKey", "404", "NotFound"))
OTHER_REGION = frozenset(
    (
        "AuthorizationHeaderMalformed",
        "PermanentRedirect",
        "IllegalLocationConstraintException",
        "InvalidLocationConstraint",
    )
)
UNKNOWN_KEY = "XAdminUserNotFound"
"""versitygw's answer, a 404."""
OURS_ALREADY = frozenset(("BucketAlreadyOwnedByYou", "BucketAlreadyExists"))
FIRST_REGION = "us-east-1"
"""The only one that a new bucket must not name."""


@dataclass(frozen=True)
class Body:
    """Bytes to send, and their CRC32: a store that knows it refuses what arrives otherwise, one that does not takes no notice."""

    content: io.BytesIO
    crc32: str

    @classmethod
    def of(cls, chunks: list[bytes]) -> "Body":
        """The only reference to the joined bytes: the client would copy what others hold too."""
        joined = b"".join(chunks)
        return cls(io.BytesIO(joined), base64.b64encode(zlib.crc32(joined).to_bytes(4, "big")).decode())


class S3Writer:
    """Buffers up to a part, then uploads parts in the background, a bounded number at a time."""

    def __init__(self, client: Any, settings: S3, key: str) -> None:
        self._client = client
        self._settings = settings
        self._place = {"Bucket": settings.bucket, "Key": key}
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._beginning: asyncio.Future[None] | None = None
        self._upload_id: str | None = None
        self._parts: list[asyncio.Task[dict[str, Any]]] = []
        self._slots = asyncio.Semaphore(PARTS_IN_FLIGHT)

    async def write(self, chunk: bytes) -> None:
        self._held.append(chunk)
        self._held_bytes += len(chunk)
        if self._held_bytes >= PART:
            with _outages(self._settings):
                await self._send(await self._taken())

    async def commit(self) -> None:
        with _outages(self._settings):
            if self._upload_id is None:
                body = await self._taken()
                await self._client.put_object(**self._place, Body=body.content, ChecksumCRC32=body.crc32)
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
        await asyncio.gather(*self._parts, *filter(None, [self._beginning]), return_exceptions=True)
        if self._upload_id is not None:
            with contextlib.suppress(ClientError, BotoCoreError):
                await self._client.abort_multipart_upload(**self._place, UploadId=self._upload_id)

    async def _begin(self) -> None:
        begun = await self._client.create_multipart_upload(**self._place, ChecksumAlgorithm="CRC32")
        self._upload_id = begun["UploadId"]

    async def _taken(self) -> Body:
        """What is held, joined in a thread."""
        held = self._held
        self._held, self._held_bytes = [], 0
        return await asyncio.to_thread(Body.of, held)

    async def _send(self, part: Body) -> None:
        if self._upload_id is None:
            self._beginning = asyncio.ensure_future(self._begin())
            # Also when this is cancelled: an upload whose id nobody knows could not be aborted.
            await asyncio.shield(self._beginning)
        await self._slots.acquire()
        done = [task for task in self._parts if task.done()]
        for task in done:
            task.result()  # a part that failed ends the upload now, not at its end
        self._parts.append(asyncio.create_task(self._upload(len(self._parts) + 1, part)))

    async def _upload(self, number: int, part: Body) -> dict[str, Any]:
        upload = {"UploadId": self._upload_id, "PartNumber": number}
        try:
            answer = await self._client.upload_part(
                **self._place, **upload, Body=part.content, ChecksumCRC32=part.crc32
            )
        finally:
            self._slots.release()
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC32": part.crc32}


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
        client, bucket, region = await self._opened(), self._settings.bucket, self._settings.region
        where = {} if region == FIRST_REGION else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        with _outages(self._settings):
            try:
                # not head_bucket, whose refusals have no words
                await client.list_objects_v2(Bucket=bucket, MaxKeys=1)
            except ClientError as error:
                if _code(error) != "NoSuchBucket":
                    raise
                await _create(client, bucket, where)

    @contextlib.asynccontextmanager
    async def writer(self, key: str) -> AsyncIterator[S3Writer]:
        writer = S3Writer(await self._opened(), self._settings, key)
        try:
            yield writer
            await writer.commit()
        except BaseException:
            await asyncio.shield(writer.abort())
            raise

    async def read(self, key: str) -> AsyncIterator[bytes]:
        client = await self._opened()
        with _outages(self._settings, key):
            answer = await client.get_object(Bucket=self._settings.bucket, Key=key)
            body = answer["Body"]
            try:
                async for chunk in body.iter_chunks(CHUNK):
                    yield chunk
            finally:
                body.close()

    async def delete(self, key: str) -> None:
        client = await self._opened()
        with contextlib.suppress(NotFound), _outages(self._settings):
            await client.delete_object(Bucket=self._settings.bucket, Key=key)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int, float]]:
        client = await self._opened()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._settings.bucket, Prefix=prefix)
        with _outages(self._settings):
            async for page in pages:
                for entry in page.get("Contents", ()):
                    yield entry["Key"], entry["Size"], entry["LastModified"].timestamp()

    async def sweep(self, prefix: str, older_than_s: float) -> int:
        """Abort the multipart uploads of processes that died in one: their parts are not listed, but paid for."""
        client, oldest, swept = await self._opened(), time.time() - older_than_s, 0
        bucket = {"Bucket": self._settings.bucket}
        pages = client.get_paginator("list_multipart_uploads").paginate(**bucket, Prefix=prefix)
        with _outages(self._settings):
            found = [upload async for page in pages for upload in page.get("Uploads", ())]
            for upload in found:
                place = bucket | {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                if upload["Initiated"].timestamp() < oldest and await _last_part(client, place) < oldest:
                    await client.abort_multipart_upload(**place)
                    swept += 1
        return swept

    async def aclose(self) -> None:
        await self._stack.aclose()

    async def _opened(self) -> Any:
        async with self._opening:
            if self._client is None:
                with _outages(self._settings):
                    self._client = await self._stack.enter_async_context(await _client(self._settings))
            return self._client


async def _client(settings: S3) -> Any:
    """A client, not yet open. Raises `NoCredentialsError`: one without would stay so when there are some at last."""
    session = aioboto3.Session(
        aws_access_key_id=settings.access_key or None,
        aws_secret_access_key=settings.secret_key.get_secret_value() if settings.secret_key else None,
        region_name=settings.region,
    )
    if await session.get_credentials() is None:
        raise NoCredentialsError
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": settings.addressing, "payload_signing_enabled": False},
        connect_timeout=3,
        read_timeout=60,
        retries={"max_attempts": 2},
        # Our own CRC32 is enough; the client's would go as a trailer, which the embedded server does not take.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return session.client(
        "s3",
        endpoint_url=settings.endpoint or None,
        verify=str(settings.ca_file) if settings.ca_file else None,
        config=config,
    )


async def _create(client: Any, bucket: str, where: dict[str, Any]) -> None:
    try:
        await client.create_bucket(Bucket=bucket, **where)
    except ClientError as error:
        # another process was faster; whether it may be used, its first use says
        if _code(error) not in OURS_ALREADY:
            raise


async def _last_part(client: Any, place: dict[str, Any]) -> float:
    """When the upload got its last part (Unix seconds): a slow one goes on for as long as its client sends."""
    pages = client.get_paginator("list_parts").paginate(**place)
    times = [part["LastModified"].timestamp() async for page in pages for part in page.get("Parts", ())]
    return max(times, default=0.0)


@contextlib.contextmanager
def _outages(settings: S3, key: str = "") -> Iterator[None]:
    """Turn the client's errors into ours. All but a missing key can be put right without losing anything, so they are waited out."""
    at = f"S3 at {settings.endpoint or 'AWS'}"
    try:
        yield
    except ClientError as error:
        if _code(error) in MISSING:
            raise NotFound(f"there is no {key} in S3") from None
        raise Unavailable(f"{at} refuses: {error}{_cure(error, settings)}") from error
    except NoCredentialsError as error:
        raise Unavailable(
            f"no credentials for {at}: set MINI_STUDIO_S3__ACCESS_KEY and MINI_STUDIO_S3__SECRET_KEY, or give this process "
            "some by the environment, a shared credentials file, or the metadata service of its container or machine"
        ) from error
    except SSLError as error:
        raise Unavailable(f"no TLS with {at}: {error}; check MINI_STUDIO_S3__CA_FILE") from error
    except (BotoCoreError, OSError, TimeoutError) as error:
        raise Unavailable(f"{at} is away: {error}") from error


def _cure(error: ClientError, settings: S3) -> str:
    """What whoever runs the studio has to do about it."""
    if _code(error) == "NoSuchBucket":
        return f"; create bucket {settings.bucket} (`mini-studio prepare` does), or set MINI_STUDIO_S3__BUCKET"
    if _code(error) in OTHER_REGION:
        return f"; set MINI_STUDIO_S3__REGION, which is {settings.region}"
    if _code(error) == UNKNOWN_KEY or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (401, 403):
        return (
            "; check MINI_STUDIO_S3__ACCESS_KEY and MINI_STUDIO_S3__SECRET_KEY (or where else this process has its credentials "
            f"from), and what they allow in bucket {settings.bucket}"
        )
    return ""


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
