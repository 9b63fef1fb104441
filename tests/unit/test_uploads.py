"""Uploads: any way of cutting a body gives the same bytes, and whatever goes wrong, neither store keeps anything."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from api.uploads import MAX_FIELD_BYTES, MAX_FIELDS, Form, read_multipart
from mini_studio.drivers.dfs import DfsStore
from mini_studio.errors import BadRequest, Invalid, StudioError, TooLarge
from mini_studio.ingest import DatasetIntake, orphans
from mini_studio.settings import Uploads

ROW = b'{"prompt": "a", "completion": "b"}\n'
LIMITS = Uploads(max_bytes=2_000_000, max_line_bytes=1000)


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'--X\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--X--\r\n"


def request(pieces: list[bytes], *, hangs_up: bool = False, **headers: str) -> Request:
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    last = {"type": "http.disconnect"} if hangs_up else {"type": "http.request", "body": b"", "more_body": False}
    waiting = iter([*messages, last])

    async def receive() -> Any:
        return next(waiting)

    sent = {"content_type": "multipart/form-data; boundary=X", **headers}
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)


async def read(sent: Request) -> tuple[Form, bytes]:
    received: list[bytes] = []

    async def keep(chunk: bytes) -> None:
        received.append(bytes(chunk))

    form = await read_multipart(sent, on_chunk=keep, limits=LIMITS)
    return form, b"".join(received)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
async def test_a_body_may_come_in_any_pieces(size: int) -> None:
    content = ROW * 3 + b"\r\n--Y is no boundary here\r\n-"
    whole = body(part("model", b"tiny-llama"), part("file", content, "a.jsonl"), part("seed", b"7"))
    form, received = await read(request([whole[at : at + size] for at in range(0, len(whole), size)]))
    assert received == content
    assert form == Form({"model": "tiny-llama", "seed": "7"}, "a.jsonl")


@pytest.mark.parametrize(
    ("filename", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\\\temp\\\\rows.jsonl", "rows.jsonl"),
        ("x" * 3000, "x" * 255),
        ("a\x01b\x7f", "ab"),
        ("", None),
    ],
)
async def test_the_filename_is_for_display_only(filename: str, shown: str | None) -> None:
    form, _ = await read(request([body(part("file", ROW, filename))]))
    assert form.filename == shown


FILE = part("file", ROW, "a.jsonl")
REFUSED: list[tuple[Request, type[StudioError], str]] = [
    (request([FILE], hangs_up=True), BadRequest, "hung up"),
    (request([FILE]), BadRequest, "middle of the form"),
    (request([b"no form at all"]), BadRequest, "not well-formed"),
    (request([body(FILE)], content_type="application/json"), Invalid, "multipart/form-data"),
    (request([body(FILE)], content_type="multipart/form-data"), Invalid, "multipart/form-data"),
    (request([], content_length="99999999"), TooLarge, "MAX_BYTES"),
    (request([body(part("model", b"x"))]), Invalid, "file: is missing"),
    (request([body(FILE, FILE)]), Invalid, "only one file"),
    (request([body(part("other", ROW, "a"))]), Invalid, "other: unexpected file"),
    (request([body(FILE, part("model", b"\xff"))]), Invalid, "model: is not UTF-8"),
    (request([body(FILE, part("model", b"x" * (MAX_FIELD_BYTES + 1)))]), TooLarge, "model"),
    (request([body(*(part(f"f{n}", b"x") for n in range(MAX_FIELDS + 1)), FILE)]), TooLarge, "fields"),
]


@pytest.mark.parametrize(("sent", "error", "says"), REFUSED, ids=[says for _, _, says in REFUSED])
async def test_bad_forms_are_refused_by_name(sent: Request, error: type[StudioError], says: str) -> None:
    with pytest.raises(error, match=says):
        await read(sent)


@pytest.fixture
def stores(tmp_path: Path) -> tuple[DfsStore, DfsStore]:
    """The object store's contract suite shows that it keeps the same promises as a folder."""
    return DfsStore(tmp_path / "dfs"), DfsStore(tmp_path / "objects")


async def take_in(stores: tuple[DfsStore, DfsStore], chunks: list[bytes], *, breaks: bool = False) -> None:
    async with DatasetIntake(*stores, LIMITS).receive("ds_1") as intake:
        for chunk in chunks:
            await intake.write(chunk)
        if breaks:
            raise ConnectionResetError("by the client")
        await intake.finish()


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())


async def test_both_stores_get_the_same_bytes(stores: tuple[DfsStore, DfsStore], tmp_path: Path) -> None:
    await take_in(stores, [ROW[:10], ROW[10:], ROW * 40_000])
    assert kept(tmp_path) == ["dfs/datasets/ds_1.jsonl", "objects/datasets/ds_1.jsonl"]
    assert {(tmp_path / name).read_bytes() for name in kept(tmp_path)} == {ROW * 40_001}


@pytest.mark.parametrize(
    ("chunks", "breaks", "error", "says"),
    [
        ([ROW * 40_000, b"not json\n"], False, Invalid, "line 40001"),
        ([b"not json\n", ROW * 40_000, ROW], False, Invalid, "line 1"),
        ([ROW * 60_000], False, TooLarge, "MAX_BYTES"),
        ([b'{"prompt": "' + b"x" * 2000], False, Invalid, "line 1"),
        ([], False, Invalid, "no rows"),
        ([ROW * 40_000], True, ConnectionResetError, "by the client"),
    ],
)
async def test_whatever_goes_wrong_leaves_nothing(
    stores: tuple[DfsStore, DfsStore],
    tmp_path: Path,
    chunks: list[bytes],
    breaks: bool,
    error: type[Exception],
    says: str,
) -> None:
    with pytest.raises(error, match=says):
        await take_in(stores, chunks, breaks=breaks)
    assert kept(tmp_path) == []


async def test_the_first_errors_are_named_by_line(stores: tuple[DfsStore, DfsStore]) -> None:
    with pytest.raises(Invalid) as raised:
        await take_in(stores, [b'{"prompt": 1, "completion": "b"}\n' * 50])
    assert [detail["line"] for detail in raised.value.details] == list(range(1, 21))


async def test_a_cancelled_upload_leaves_nothing(stores: tuple[DfsStore, DfsStore], tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield ROW * 10
            await asyncio.sleep(0)

    async def upload() -> None:
        async with DatasetIntake(*stores, LIMITS).receive("ds_1") as intake:
            async for chunk in endless():
                await intake.write(chunk[: len(ROW)])

    task = asyncio.create_task(upload())
    while not kept(tmp_path):
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert kept(tmp_path) == []


async def test_only_old_bytes_without_a_record_are_orphans(stores: tuple[DfsStore, DfsStore]) -> None:
    async def known(key: str) -> bool:
        return "2" in key

    for name in ("1", "2"):
        async with stores[0].writer(f"datasets/{name}.jsonl") as writer:
            await writer.write(ROW)
    assert [key async for key in orphans(stores[0], 3600, known)] == []
    assert [key async for key in orphans(stores[0], -1, known)] == ["datasets/1.jsonl"]
