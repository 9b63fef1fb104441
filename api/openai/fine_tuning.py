"""`/v1/fine_tuning/jobs`: the studio's jobs. One that is created here has its result deployed."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request

from api import submissions
from api.deps import Feed, IdempotencyHeader, TheCause, TheStudio
from api.openai.callers import Caller, Client, required
from api.openai.jobs import deployment_ids, history, job_object, routed
from api.openai.pages import paged
from events.types import JobId
from mini_studio.errors import Conflict, Invalid, NotFound
from mini_studio.records.jobs import Job
from mini_studio.wiring import Studio
from schemas.fine_tuning import FineTuningJobRequest
from schemas.openai import (
    FAILURES,
    FineTuningJob,
    FineTuningJobCheckpointList,
    FineTuningJobCreate,
    FineTuningJobEventList,
    FineTuningJobList,
)

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["openai"], responses=FAILURES)

Id = Annotated[str, Path(max_length=200)]
Limit = Annotated[int, Query(ge=1, le=100)]
ROUTE_S = 1.0


@router.post("")
async def create_job(
    body: FineTuningJobCreate, studio: TheStudio, cause: TheCause, client: Caller, key: IdempotencyHeader = None
) -> FineTuningJob:
    """Queue a fine-tune on a file. When it has succeeded its model can be asked: nothing else has to be called."""
    owner = required(client, body.client_code)
    await check_file(body.training_file, owner, studio)
    asked = body.asked().model_dump(exclude_none=True)
    request = FineTuningJobRequest(
        model=body.model,
        client_code=owner,
        dataset_filename=body.training_file,
        seed=body.seed or 0,
        suffix=body.suffix,
        **asked,
    )
    job = await submissions.submit(request, studio, cause, key, owner, deploy=True, metadata=body.metadata)
    return job_object(job, None)


@router.get("")
async def list_jobs(
    request: Request, studio: TheStudio, client: Client, limit: Limit = 20, after: JobId | None = None
) -> FineTuningJobList:
    """The client's jobs, newest first, those that were submitted elsewhere among them."""
    if any(name.partition("[")[0] == "metadata" for name in request.query_params):
        raise Invalid("metadata: jobs cannot be listed by it; leave it out")
    jobs = await studio.jobs.page(client, limit=limit + 1, after=after)
    ids = deployment_ids(jobs)
    deployments = await studio.deployments.get_all(client, list(ids.values()))
    return paged(FineTuningJobList, [job_object(job, deployments.get(ids.get(job.id, ""))) for job in jobs], limit)


@router.get("/{job_id}")
async def get_job(job_id: Id, studio: TheStudio, feed: Feed, client: Client) -> FineTuningJob:
    """One job."""
    job = await job_of(job_id, client, studio)
    id = deployment_ids([job]).get(job.id)
    deployment = None if id is None else await studio.deployments.get(client, id)
    if deployment is not None:
        # Who hears that the job has succeeded asks its model next.
        await feed.read_until(lambda table: routed(deployment, table), ROUTE_S)
    return job_object(job, deployment)


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: Id, studio: TheStudio, cause: TheCause, client: Client) -> FineTuningJob:
    """Ask for the job's end. It is `cancelled` as soon as its training has ended."""
    await job_of(job_id, client, studio)
    return job_object(await submissions.cancel(studio, job_id, client, cause), None)


@router.get("/{job_id}/events")
async def list_events(
    job_id: Id,
    studio: TheStudio,
    client: Client,
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> FineTuningJobEventList:
    """What the log says of the job and of the deployment of its result, newest first."""
    job = await job_of(job_id, client, studio)
    events = await history(job, studio)
    places = {event.id: place for place, event in enumerate(events, start=1)}
    start = 0 if after is None else places.get(after, len(events))
    return paged(FineTuningJobEventList, events[start : start + limit + 1], limit)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: Id,
    studio: TheStudio,
    client: Client,
    limit: Limit = 10,
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> FineTuningJobCheckpointList:
    """None: the studio's checkpoints are for the next attempt of the same job alone."""
    await job_of(job_id, client, studio)
    return paged(FineTuningJobCheckpointList, [], limit)


async def job_of(id: str, client: str, studio: Studio) -> Job:
    """The client's job. Raises `NotFound`."""
    job = await studio.jobs.get(client, id)
    if job is None:
        raise NotFound(f"client {client!r} has no job {id!r}")
    return job


async def check_file(id: str, client: str, studio: Studio) -> None:
    """The file is there and whole. Raises `NotFound` or `Conflict`."""
    dataset = await studio.datasets.get(client, id)
    if dataset is None or dataset.deleted:
        raise NotFound(f"training_file: client {client!r} has no file {id!r}; upload it to /v1/files")
    if dataset.state == "damaged":
        raise Conflict(f"training_file: {dataset.message}")
