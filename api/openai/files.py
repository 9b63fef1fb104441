"""`/v1/files`: datasets. A file's id is its dataset's."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse

from api import submissions
from api.deps import IdempotencyHeader, TheCause, TheStudio
from api.openai.callers import Caller, Client, in_form, required
from api.openai.pages import paged
from api.uploads import read_multipart
from events.types import DatasetId
from mini_studio.errors import Invalid, NotFound
from mini_studio.ingest import key_of
from mini_studio.records.datasets import Dataset
from mini_studio.wiring import Studio
from schemas.openai import FAILURES, FileDeleted, FileList, FileObject, unix

router = APIRouter(prefix="/v1/files", tags=["openai"], responses=FAILURES)

PURPOSE = "fine-tune"
FIELDS = ("purpose", "client_code")
FILE_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": [PURPOSE]},
        "client_code": {"type": "string"},
    },
}
FORM = {"requestBody": {"content": {"multipart/form-data": {"schema": FILE_FORM}}, "required": True}}
STATUS: dict[str, Literal["uploaded", "processed", "error"]] = {"verified": "processed", "damaged": "error"}
MAX_PAGE = 10_000

FileId = Annotated[str, Path(max_length=200)]


@router.post("", openapi_extra=FORM)
async def create_file(
    request: Request, studio: TheStudio, cause: TheCause, client: Caller, key: IdempotencyHeader = None
) -> FileObject:
    """Upload JSON lines to fine-tune on. Checked line by line as it streams in; `processed` follows shortly."""
    async with submissions.receiving(studio) as intake:
        form = await read_multipart(
            request, on_chunk=intake.write, limits=studio.settings.uploads, before_file=check_fields
        )
        check_fields(form.fields)
        if "purpose" not in form.fields:
            raise Invalid(f"purpose: is missing; it is {PURPOSE!r}")
        owner = required(client, in_form(form.fields))
        await intake.finish()
    return file_object(await submissions.add_dataset(studio, owner, intake, form.filename, cause, key))


@router.get("")
async def list_files(
    studio: TheStudio,
    client: Client,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    after: DatasetId | None = None,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=100)] = None,
) -> FileList:
    """The client's files, newest first unless `order` is `asc`; there are none of another purpose than `fine-tune`."""
    if purpose not in (None, PURPOSE):
        return paged(FileList, [], limit)
    found = await studio.datasets.present(client, limit=limit + 1, after=after, newest_first=order == "desc")
    return paged(FileList, [file_object(dataset) for dataset in found], limit)


@router.get("/{file_id}")
async def get_file(file_id: FileId, studio: TheStudio, client: Client) -> FileObject:
    """One file."""
    return file_object(await dataset_of(file_id, client, studio))


@router.get("/{file_id}/content", response_class=StreamingResponse)
async def get_file_content(file_id: FileId, studio: TheStudio, client: Client) -> StreamingResponse:
    """The bytes as they were uploaded."""
    dataset = await dataset_of(file_id, client, studio)
    chunks = studio.dfs.read(key_of(dataset.dfs_path))
    # Before the answer begins: what is not there is a 404.
    first = await anext(aiter(chunks))
    return StreamingResponse(
        _from(first, chunks), media_type="application/jsonl", headers={"Content-Length": str(dataset.size_bytes)}
    )


@router.delete("/{file_id}")
async def delete_file(file_id: FileId, studio: TheStudio, cause: TheCause, client: Client) -> FileDeleted:
    """Delete a file that no job needs any more; its jobs and their models stay."""
    dataset = await dataset_of(file_id, client, studio)
    await submissions.delete_dataset(studio, dataset.id, client, cause)
    return FileDeleted(id=dataset.id)


async def _from(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk


async def dataset_of(id: str, client: str, studio: Studio) -> Dataset:
    """The client's dataset. Raises `NotFound`."""
    dataset = await studio.datasets.get(client, id)
    if dataset is None or dataset.deleted:
        raise NotFound(f"client {client!r} has no file {id!r}")
    return dataset


def check_fields(fields: dict[str, str]) -> None:
    """Refuse what the form asks for and the studio does not have: as a rule before the file's first byte."""
    for name, value in fields.items():
        if name == "purpose" and value != PURPOSE:
            raise Invalid(
                f"purpose: {value[:100]!r} is not supported; files are datasets, their purpose is {PURPOSE!r}"
            )
        if name.startswith("expires_after"):
            raise Invalid("expires_after: is not supported; files stay until they are deleted")
        if name not in FIELDS:
            raise Invalid(f"{name[:100]}: unknown field", details=[{"field": name[:100]}])


def file_object(dataset: Dataset) -> FileObject:
    return FileObject(
        id=dataset.id,
        bytes=dataset.size_bytes,
        created_at=unix(dataset.created_at),
        filename=dataset.filename or f"{dataset.id}.jsonl",
        status=STATUS.get(dataset.state, "uploaded"),
        status_details=dataset.message,
    )
