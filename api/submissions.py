"""What a submission does behind its handler: take bytes in, tie keys to requests, write the record with its event."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel

from api.deps import check_tenant
from api.uploads import read_multipart
from events.base import Cause
from events.datasets import DatasetUploaded
from events.fine_tuning import DatasetRef, FineTuneRequested
from events.types import derived_id, new_id
from mini_studio.errors import BadRequest, Conflict, Invalid, TooLarge
from mini_studio.ingest import Intake
from mini_studio.records.datasets import Dataset
from mini_studio.records.idempotency import fingerprint
from mini_studio.records.jobs import Job
from mini_studio.records.projection import requested, timestamp
from mini_studio.records.store import DuplicateRecord
from mini_studio.wiring import Studio
from schemas.fine_tuning import DatasetUploadResponse, FineTuningJobRequest

R = TypeVar("R")


@contextlib.asynccontextmanager
async def receiving(studio: Studio) -> AsyncIterator[Intake]:
    """Bytes on their way into both stores, under an id of their own: nothing stays of them if the context fails."""
    await studio.load_s3()
    async with studio.intake.receive(new_id("ds")) as intake:
        yield intake


async def add_dataset(
    studio: Studio, client_code: str, intake: Intake, filename: str | None, cause: Cause, key: str | None
) -> Dataset:
    """Record received bytes as a dataset. With a key that was used before: the dataset it made then."""
    summary = intake.summary
    id = derived_id("ds", client_code, key) if key else intake.id
    event = DatasetUploaded(
        dataset_id=id,
        filename=filename,
        dfs_path=studio.dfs.location(intake.key),
        s3_uri=studio.s3.location(intake.key),
        size_bytes=summary.size_bytes,
        sha256=summary.sha256,
        format=summary.format,
        rows=summary.rows,
        characters=summary.characters,
        longest_line_bytes=summary.longest_line_bytes,
    )
    record = requested(Dataset, event, subject=id, client_code=client_code, cause=cause)
    try:
        if key:
            await claim(studio, client_code, "upload", key, fingerprint(summary.sha256), cause)
        await studio.datasets.insert(record)
    except DuplicateRecord:
        await intake.discard()
        return await existing(studio.datasets.get(client_code, id))
    except Exception:
        # Not when cancelled: the record may be written all the same. The sweep takes the bytes of one that was not.
        await intake.discard()
        raise
    return record


async def submit_form(request: Request, studio: Studio, cause: Cause, key: str | None, user: str | None) -> Job:
    """A multipart submission: the file is the dataset, the other parts are the fields."""
    async with receiving(studio) as intake:
        form = await read_multipart(
            request, on_chunk=intake.write, limits=studio.settings.uploads, file_fields=("dataset_filename", "file")
        )
        body = FineTuningJobRequest.model_validate({**fields(form.fields), "dataset_filename": "uploaded"})
        check_tenant(user, body.client_code)
        studio.catalogue.require(body.model)
        await intake.finish()
    dataset = await add_dataset(studio, body.client_code, intake, form.filename, cause, key and f"submit\x00{key}")
    return await submit(body.model_copy(update={"dataset_filename": dataset.id}), studio, cause, key, user)


def fields(texts: dict[str, str]) -> dict[str, Any]:
    """Form fields as JSON values where a field is an object or null."""
    values: dict[str, Any] = dict(texts)
    if "lora" in texts:
        try:
            values["lora"] = json.loads(texts["lora"] or "null")
        except (ValueError, RecursionError):
            raise Invalid("lora: must be a JSON object or null", details=[{"field": "lora"}]) from None
    return {name: value for name, value in values.items() if value != "" or name in ("client_code", "model")}


async def submit(body: FineTuningJobRequest, studio: Studio, cause: Cause, key: str | None, user: str | None) -> Job:
    """Write the job with its event. With a key that was used before for the same request: the job it made then."""
    tenant = body.client_code
    check_tenant(user, tenant)
    base = studio.catalogue.require(body.model)
    dataset = await studio.datasets.resolve(tenant, body.dataset_filename, studio.s3.location("").rstrip("/"))
    if dataset.state == "damaged":
        raise Conflict(f"dataset_filename: {dataset.message}")
    if key:
        same = body.model_copy(update={"dataset_filename": dataset.id}).model_dump_json()
        await claim(studio, tenant, "fine_tune", key, fingerprint(same), cause)
    id = derived_id("job", tenant, key) if key else new_id("job")
    tiny = base.parameters is not None and base.parameters <= studio.settings.training.lora_over_parameters
    default = "full" if tiny else "lora"
    event = FineTuneRequested(
        job_id=id,
        base_model=body.model,
        fine_tuned_model=fine_tuned_name(body.model, tenant, body.suffix, id),
        dataset=DatasetRef(id=dataset.id, dfs_path=dataset.dfs_path, sha256=dataset.sha256, rows=dataset.rows),
        hyperparameters=body.resolve(dataset.rows, default),  # type: ignore[arg-type]
        suffix=body.suffix,
    )
    job = requested(Job, event, subject=id, client_code=tenant, cause=cause)
    try:
        await studio.jobs.insert(job)
    except DuplicateRecord:
        return await existing(studio.jobs.get(tenant, id))
    return job


def fine_tuned_name(base: str, tenant: str, suffix: str | None, id: str) -> str:
    """`ft:<base>:<client>:<suffix and the job's last 8 hex digits>`: two jobs never share a name."""
    last = id[-8:]
    return f"ft:{base}:{tenant}:{suffix}-{last}" if suffix else f"ft:{base}:{tenant}:{last}"


async def claim(studio: Studio, tenant: str, action: str, key: str, value: str, cause: Cause) -> None:
    await studio.keys.claim(tenant, action, key, value, cause=cause, at=timestamp(datetime.now(UTC)))


async def existing(found: Awaitable[R | None]) -> R:
    """The record that was made under the same key."""
    record = await found
    if record is None:
        raise Conflict("this Idempotency-Key belongs to something that is not there any more")
    return record


async def json_body(request: Request, studio: Studio) -> bytes:
    """The body, within the limit of JSON bodies."""
    limit = studio.settings.api.max_body_bytes
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"the body is larger than {limit} bytes (MINI_STUDIO_API__MAX_BODY_BYTES)")
    if not body:
        raise BadRequest("the body is empty; send JSON, or multipart/form-data with the dataset as a file")
    return bytes(body)


def dataset_view(dataset: Dataset) -> DatasetUploadResponse:
    return DatasetUploadResponse(
        dataset_id=dataset.id,
        dataset_dfs=dataset.dfs_path,
        dataset_s3=dataset.s3_uri,
        size_bytes=dataset.size_bytes,
        sha256=dataset.sha256,
        format=dataset.format,
        rows=dataset.rows,
        filename=dataset.filename,
    )


def multipart_schema(model: type[BaseModel], file_field: str) -> dict[str, Any]:
    """The model's JSON Schema with one field as a file."""
    schema = model.model_json_schema()
    schema["properties"][file_field] = {"type": "string", "format": "binary"}
    return schema
