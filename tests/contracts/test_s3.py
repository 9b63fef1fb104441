"""What is S3's own, on both servers: addressing, TLS, credentials, checksums, refusals, and what an upload leaves behind."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import aioboto3
import pytest
from pydantic import SecretStr

from mini_studio.drivers.s3 import S3Store, S3Writer
from mini_studio.errors import NotFound, Unavailable
from mini_studio.settings import S3
from tests.fakes import certificates
from tests.fakes.certificates import Certificates
from tests.fakes.relay_proxy import between
from tests.fakes.s3_servers import embedded_s3, real_s3

KEY = "datasets/ds_1.jsonl"
MIB = 1024 * 1024
NO_CREDENTIALS = {"access_key": None, "secret_key": None}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.made(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@asynccontextmanager
async def opened(settings: S3, **changes: Any) -> AsyncIterator[S3Store]:
    store = S3Store(settings.model_copy(update=changes))
    yield store
    await store.aclose()


async def works(store: S3Store) -> None:
    """A bucket, an object in parts and one in one piece, read, listed and deleted."""
    await store.ensure_bucket()
    for size in (10, 20 * MIB):
        async with store.writer(KEY) as writer:
            for _ in range(0, size, MIB):
                await writer.write(b"x" * min(size, MIB))
        assert sum([len(chunk) async for chunk in store.read(KEY)]) == size
        assert [found async for _, found, _ in store.list(KEY)] == [size]
    await store.delete(KEY)
    with pytest.raises(NotFound):
        assert [chunk async for chunk in store.read(KEY)]


def port_of(settings: S3) -> int:
    return urlsplit(str(settings.endpoint)).port or 80


def secret_of(settings: S3) -> str:
    assert settings.secret_key is not None
    return settings.secret_key.get_secret_value()


async def unfinished(settings: S3) -> list[str]:
    """Keys of multipart uploads that were begun and neither completed nor aborted."""
    session = aioboto3.Session(settings.access_key, secret_of(settings), region_name=settings.region)
    async with session.client("s3", endpoint_url=settings.endpoint) as client:
        answer = await client.list_multipart_uploads(Bucket=settings.bucket)
    return [upload["Key"] for upload in answer.get("Uploads", ())]


@pytest.fixture
def names_below_localhost(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lead to this machine by their standard, and not on every machine."""
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith("localhost") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize("server", ["embedded", pytest.param("real", marks=pytest.mark.real)])
async def test_the_bucket_in_the_host_name(server: str, tmp_path: Path, names_below_localhost: None) -> None:
    with real_s3(tmp_path) if server == "real" else embedded_s3(tmp_path, "--force-path-style=false") as settings:
        seen = []

        def look(chunk: bytes) -> bytes:
            seen.append(chunk)
            return chunk

        async with between(port_of(settings), spoil=look) as port:
            endpoint = f"http://localhost:{port}"
            async with opened(settings, endpoint=endpoint, addressing="virtual") as store:
                await works(store)
    assert any(b"Host: mini-studio.localhost" in chunk and b" /datasets/ds_1.jsonl" in chunk for chunk in seen)


async def test_only_a_server_of_the_given_authority_is_trusted(s3_settings: S3, tls: Certificates) -> None:
    async with between(port_of(s3_settings), tls) as port:
        secured = s3_settings.model_copy(update={"endpoint": f"https://127.0.0.1:{port}"})
        async with opened(secured, ca_file=tls.ca) as store:
            await works(store)
        async with opened(secured) as store:
            with pytest.raises(
                Unavailable, match=r"no TLS with S3 at .*CERTIFICATE_VERIFY_FAILED.*MINI_STUDIO_S3__CA_FILE"
            ):
                await store.ensure_bucket()


class Metadata(BaseHTTPRequestHandler):
    """Gives credentials to who shows the token, as the agent of a container does."""

    credentials: dict[str, str]

    def do_GET(self) -> None:
        allowed = self.headers["Authorization"] == "a-token"
        self.send_response(200 if allowed else 403)
        self.end_headers()
        self.wfile.write(json.dumps(self.credentials).encode() if allowed else b"{}")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def metadata_service(s3_settings: S3) -> Iterator[str]:
    expires = {"Token": "", "Expiration": "2100-01-01T00:00:00Z"}
    keys = {"AccessKeyId": str(s3_settings.access_key), "SecretAccessKey": secret_of(s3_settings)}
    handler = type("Handler", (Metadata,), {"credentials": keys | expires})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/credentials"
    server.shutdown()


@pytest.mark.parametrize("source", ["environment", "shared file", "metadata service"])
async def test_credentials_from_where_the_process_runs(
    source: str, s3_settings: S3, metadata_service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with opened(s3_settings, **NO_CREDENTIALS) as store:
        with pytest.raises(Unavailable, match=r"no credentials for S3 at .*MINI_STUDIO_S3__ACCESS_KEY"):
            await store.ensure_bucket()
        if source == "environment":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", str(s3_settings.access_key))
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_of(s3_settings))
        elif source == "shared file":
            keys = f"aws_access_key_id={s3_settings.access_key}\naws_secret_access_key={secret_of(s3_settings)}\n"
            (tmp_path / "credentials").write_text(f"[default]\n{keys}")
        else:
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", metadata_service)
            monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "a-token")
        await works(store)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"secret_key": SecretStr("another-secret")}, "SignatureDoesNotMatch.*MINI_STUDIO_S3__SECRET_KEY"),
        ({"access_key": "nobody-at-all"}, "MINI_STUDIO_S3__ACCESS_KEY"),
        ({"bucket": "no-such-bucket"}, "NoSuchBucket.*mini-studio prepare.*MINI_STUDIO_S3__BUCKET"),
        ({"endpoint": "http://127.0.0.1:1"}, "S3 at http://127.0.0.1:1 is away"),
    ],
)
async def test_refusals_say_what_to_do(s3_settings: S3, changes: dict[str, Any], said: str) -> None:
    async with opened(s3_settings, **changes) as store:
        with pytest.raises(Unavailable, match=said):
            assert [chunk async for chunk in store.read(KEY)]
        with pytest.raises(Unavailable, match=said):
            async with store.writer(KEY) as writer:
                await writer.write(b"x")
        if "bucket" not in changes:
            with pytest.raises(Unavailable, match=said):
                await store.ensure_bucket()


async def test_parts_are_uploaded_side_by_side(s3_settings: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0
    upload = S3Writer._upload

    async def counted(*args: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await upload(*args)
        finally:
            running -= 1

    monkeypatch.setattr(S3Writer, "_upload", counted)
    async with opened(s3_settings) as store:
        await works(store)
    assert most == 2
    assert await unfinished(s3_settings) == []


async def test_a_writer_that_is_cancelled_leaves_no_parts(s3_settings: S3) -> None:
    async with opened(s3_settings) as store:
        await store.ensure_bucket()

        async def write() -> None:
            async with store.writer(KEY) as writer:
                while True:
                    await writer.write(bytes(MIB))

        writing = asyncio.create_task(write())
        while not await unfinished(s3_settings):
            await asyncio.sleep(0.01)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        assert await unfinished(s3_settings) == []


@pytest.mark.real
@pytest.mark.parametrize("size", [100, 20 * MIB])
async def test_bytes_that_were_changed_on_their_way_are_refused(size: int, tmp_path: Path, tls: Certificates) -> None:
    sent = b"-" * (size - 10) + b"needle" + b"----"
    with real_s3(tmp_path) as settings:
        async with between(port_of(settings), tls, lambda chunk: chunk.replace(b"needle", b"noodle")) as port:
            secured = {"endpoint": f"https://127.0.0.1:{port}", "ca_file": tls.ca}
            async with opened(settings, **secured) as store:
                await store.ensure_bucket()
                with pytest.raises(Unavailable, match=r"BadDigest.*CRC32"):
                    async with store.writer(KEY) as writer:
                        for start in range(0, size, MIB):
                            await writer.write(sent[start : start + MIB])
                assert [found async for found in store.list("")] == []
        assert await unfinished(settings) == []
