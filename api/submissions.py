"""What a submission does behind its handler: take bytes in, tie keys to requests, write the record with its event."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel

from api.deps import check_tenant
from api.uploads import read_multipart
from events.base import Cause
from events.datasets import DatasetDeleted, DatasetUploaded
from events.fine_tuning import DatasetRef, FineTuneCancelRequested, FineTuneRequested
from events.types import JobStatus, derived_id, new_id
from mini_studio.errors import BadRequest, Conflict, Invalid, NotFound, TooLarge
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
    """Record received bytes as a dataset. With a key that was used before: the dataset it made then, if that is still there."""
    dataset = await record_dataset(studio, client_code, intake, filename, cause, key)
    if dataset.deleted:
        raise Conflict(
            f"this Idempotency-Key made dataset {dataset.id}, which was deleted; to upload the file again, use a new key"
        )
    return dataset


async def record_dataset(
    studio: Studio, client_code: str, intake: Intake, filename: str | None, cause: Cause, key: str | None
) -> Dataset:
    """The dataset of these bytes, or what its key made before, even if that is deleted by now."""
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
    dataset = await record_dataset(studio, body.client_code, intake, form.filename, cause, key and f"submit\x00{key}")
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


async def submit(
    body: FineTuningJobRequest,
    studio: Studio,
    cause: Cause,
    key: str | None,
    user: str | None,
    *,
    deploy: bool = False,
    metadata: dict[str, str] | None = None,
) -> Job:
    """Write the job with its event. With a key that was used before for the same request: the job it made then.

    `deploy` has its result served as soon as there is one.
    """
    tenant = body.client_code
    check_tenant(user, tenant)
    base = studio.catalogue.require(body.model)
    dataset = await studio.datasets.resolve(tenant, body.dataset_filename, studio.s3.location("").rstrip("/"))
    id = derived_id("job", tenant, key) if key else new_id("job")
    if dataset.deleted and (not key or await studio.jobs.get(tenant, id) is None):
        raise NotFound(f"dataset_filename: dataset {dataset.id} was deleted; upload the file again")
    if dataset.state == "damaged":
        raise Conflict(f"dataset_filename: {dataset.message}")
    if key:
        same = body.model_copy(update={"dataset_filename": dataset.id}).model_dump_json()
        more = (f"{deploy}", json.dumps(metadata, sort_keys=True)) if deploy or metadata else ()
        await claim(studio, tenant, "fine_tune", key, fingerprint(same, *more), cause)
    tiny = base.parameters is not None and base.parameters <= studio.settings.training.lora_over_parameters
    default = "full" if tiny else "lora"
    event = FineTuneRequested(
        job_id=id,
        base_model=body.model,
        fine_tuned_model=fine_tuned_name(body.model, tenant, body.suffix, id),
        dataset=DatasetRef(id=dataset.id, dfs_path=dataset.dfs_path, sha256=dataset.sha256, rows=dataset.rows),
        hyperparameters=body.resolve(dataset.rows, default),  # type: ignore[arg-type]
        suffix=body.suffix,
        deploy=deploy,
        metadata=metadata or {},
    )
    job = requested(Job, event, subject=id, client_code=tenant, cause=cause)
    try:
        await studio.jobs.insert(job)
    except DuplicateRecord:
        return await existing(studio.jobs.get(tenant, id))
    return job


async def cancel(studio: Studio, job_id: str, user: str, cause: Cause) -> Job:
    """Ask for the job's end; its record tells when it is cancelled. Again, or where it is over that way, it changes nothing.

    `user`: whose job it must be, or `ANYONE`. Raises `NotFound`, or `Conflict` for a job that came to another end before.
    """

    def ask(job: Job) -> Job | None:
        wanted = not job.status.final and not job.cancel_requested
        return job.asking(FineTuneCancelRequested(job_id=job.id), cause) if wanted else None

    job = await studio.jobs.change(user, job_id, ask) or await studio.jobs.get(user, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id[:200]!r}")
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise Conflict(f"job {job.id} is over: it has {job.status.value}, so there is nothing to cancel")
    return job


async def delete_dataset(studio: Studio, dataset_id: str, client: str, cause: Cause) -> Dataset:
    """Make the dataset a tombstone; its bytes are removed after that. Again, it changes nothing.

    `client`: whose dataset it must be, or `ANYONE`. Raises `NotFound`, or `Conflict` while a job uses it. A job that is submitted
    at this very moment may come through with it: its trainer then finds no file, and the job fails and names the dataset.
    """
    found = await studio.datasets.get(client, dataset_id)
    if found is None:
        raise NotFound(f"there is no dataset {dataset_id[:200]!r}")
    if found.deleted:
        return found
    if (job := await using(studio, found)) is not None:
        raise Conflict(
            f"dataset {found.id} is used by job {job.id}, which is {job.status.value}; wait for its end or cancel it first"
        )

    def delete(dataset: Dataset) -> Dataset | None:
        nonlocal found
        found = dataset
        event = DatasetDeleted(dataset_id=dataset.id, dfs_path=dataset.dfs_path, s3_uri=dataset.s3_uri)
        return None if dataset.deleted else dataset.asking(event, cause)

    return await studio.datasets.change(client, dataset_id, delete) or found


async def using(studio: Studio, dataset: Dataset) -> Job | None:
    """A job that is not over and trains on the dataset. Queued ones first: those become running ones, hardly ever the reverse."""
    for status in (JobStatus.QUEUED, JobStatus.RUNNING):
        async for job in studio.jobs.each(dataset.client_code, status=status.value):
            if job.dataset.id == dataset.id:
                return job
    return None


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
    schema = json_schema(model)
    schema["properties"][file_field] = {"type": "string", "format": "binary"}
    return schema


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON Schema in one piece: what it refers to would not be found from within the API's description."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(definitions[part["$ref"].rpartition("/")[2]])
        return {name: whole(value) for name, value in part.items()}

    return cast("dict[str, Any]", whole(schema))
