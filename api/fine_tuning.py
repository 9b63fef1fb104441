"""Datasets and fine-tuning jobs."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import ValidationError

from api import submissions
from api.deps import AsOf, IdempotencyHeader, TheCause, TheStudio, UserId, at, check_tenant
from api.errors import invalid_from
from api.uploads import read_multipart
from events.types import ClientCode, DatasetId, JobId
from mini_studio.errors import NotFound
from mini_studio.records.record import ANYONE
from schemas.fine_tuning import (
    ClusterStatusResponse,
    DatasetListResponse,
    DatasetResponse,
    DatasetUploadResponse,
    DatasetView,
    ErrorResponse,
    FineTuningJobRequest,
    JobListResponse,
    JobResponse,
    JobView,
)

router = APIRouter(
    prefix="/fine_tuning",
    tags=["fine-tuning"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)

FILE = {"type": "string", "format": "binary"}
UPLOAD_BODY = {
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {"file": FILE}}}
    },
    "required": True,
}


@router.get("/cluster-status")
async def cluster_status(studio: TheStudio) -> ClusterStatusResponse:
    """Ray's resources, or why they cannot be had."""
    return ClusterStatusResponse(status=await studio.cluster.status())


@router.get("/jobs/client/{client_code}")
async def list_jobs(
    client_code: ClientCode,
    studio: TheStudio,
    user: UserId = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: JobId | None = None,
    as_of: AsOf = None,
) -> JobListResponse:
    """The client's jobs, newest first; with `as_of`, those that there were then, as their events up to then had them."""
    check_tenant(user, client_code)
    found = await studio.jobs.page_at(client_code, as_of, limit=limit + 1, after=after)
    jobs = [JobView.model_validate(job) for job in found[:limit]]
    return JobListResponse(jobs=jobs, has_more=len(found) > limit, last_id=jobs[-1].id if jobs else None)


@router.get("/jobs/{job_id}")
async def get_job(
    job_id: Annotated[str, Path(max_length=200)], studio: TheStudio, user: UserId = None, as_of: AsOf = None
) -> JobResponse:
    """One job; with `X-User-ID`, only if it is that client's.

    With `as_of` it is answered from the log: the job as its events up to that time had it, 404 before its first one.
    """
    job = await studio.jobs.at(user or ANYONE, job_id, as_of)
    if job is None:
        raise NotFound(f"there is no job {job_id!r}{at(as_of)}")
    return JobResponse(job=JobView.model_validate(job))


@router.post("/jobs/{job_id}/cancel", status_code=202)
async def cancel_job(
    job_id: Annotated[str, Path(max_length=200)],
    response: Response,
    studio: TheStudio,
    cause: TheCause,
    user: UserId = None,
) -> JobResponse:
    """End a job that is not over; follow it until its status is `cancelled`. Again it changes nothing, and is 200 once it is.

    409 for a job that succeeded or failed: a success that was decided before the cancel stands.
    """
    job = await submissions.cancel(studio, job_id, user or ANYONE, cause)
    if job.status.final:
        response.status_code = 200
    return JobResponse(job=JobView.model_validate(job))


@router.get("/datasets/client/{client_code}")
async def list_datasets(
    client_code: ClientCode,
    studio: TheStudio,
    user: UserId = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: DatasetId | None = None,
    as_of: AsOf = None,
) -> DatasetListResponse:
    """The client's datasets, newest first, deleted ones left out; with `as_of`, those that there were then."""
    check_tenant(user, client_code)
    found = await studio.datasets.present(client_code, limit=limit + 1, after=after, as_of=as_of)
    datasets = [DatasetView.model_validate(dataset) for dataset in found[:limit]]
    last = datasets[-1].id if datasets else None
    return DatasetListResponse(datasets=datasets, has_more=len(found) > limit, last_id=last)


@router.get("/datasets/{dataset_id}")
async def get_dataset(
    dataset_id: Annotated[str, Path(max_length=200)], studio: TheStudio, user: UserId = None, as_of: AsOf = None
) -> DatasetResponse:
    """One dataset; 404 once it is deleted. With `as_of` it is answered from the log, as the dataset was then."""
    dataset = await studio.datasets.require(user or ANYONE, dataset_id, as_of)
    return DatasetResponse(dataset=DatasetView.model_validate(dataset))


@router.delete("/datasets/{dataset_id}")
async def delete_dataset(
    dataset_id: Annotated[str, Path(max_length=200)], studio: TheStudio, cause: TheCause, user: UserId = None
) -> DatasetResponse:
    """Delete a dataset for good, and both copies of its bytes. Again it changes nothing. 409 while a job is to train on it."""
    dataset = await submissions.delete_dataset(studio, dataset_id, user or ANYONE, cause)
    return DatasetResponse(dataset=DatasetView.model_validate(dataset))


@router.post("/upload-dataset/{client_code}", status_code=201, openapi_extra={"requestBody": UPLOAD_BODY})
async def upload_dataset(
    client_code: ClientCode,
    request: Request,
    studio: TheStudio,
    cause: TheCause,
    key: IdempotencyHeader = None,
    user: UserId = None,
) -> DatasetUploadResponse:
    """Upload JSON lines: all `prompt`/`completion`, or all chat `messages`. Checked line by line as it streams in."""
    check_tenant(user, client_code)
    async with submissions.receiving(studio) as intake:
        form = await read_multipart(request, on_chunk=intake.write, limits=studio.settings.uploads)
        await intake.finish()
    dataset = await submissions.add_dataset(studio, client_code, intake, form.filename, cause, key)
    return submissions.dataset_view(dataset)


@router.post(
    "/submit-finetune",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "content": {
                "application/json": {"schema": submissions.json_schema(FineTuningJobRequest)},
                "multipart/form-data": {
                    "schema": submissions.multipart_schema(FineTuningJobRequest, "dataset_filename")
                },
            },
            "required": True,
        }
    },
)
async def submit_finetune(
    request: Request, studio: TheStudio, cause: TheCause, key: IdempotencyHeader = None, user: UserId = None
) -> JobResponse:
    """Queue a fine-tune of a known dataset, or of a file in the same (multipart) request; follow it at its job."""
    try:
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            job = await submissions.submit_form(request, studio, cause, key, user)
        else:
            body = FineTuningJobRequest.model_validate_json(await submissions.json_body(request, studio))
            job = await submissions.submit(body, studio, cause, key, user)
    except ValidationError as error:
        raise invalid_from(error) from None
    return JobResponse(job=JobView.model_validate(job))
