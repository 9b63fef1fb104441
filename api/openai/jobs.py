"""Jobs and their events as OpenAI's clients see them."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from events.base import Envelope, Event
from events.deployments import DeploymentApplied, DeploymentFailed, DeploymentReady, DeployRequested
from events.fine_tuning import (
    FineTuneCancelled,
    FineTuneCancelRequested,
    FineTuneFailed,
    FineTuneProgressed,
    FineTuneQueued,
    FineTuneRequested,
    FineTuneStarted,
    FineTuneSucceeded,
)
from events.types import DeploymentKind, DeploymentStatus, JobStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.records.deployments import Deployment, deployment_id
from mini_studio.records.jobs import Job
from mini_studio.wiring import Studio
from schemas.openai import FineTuningJob, FineTuningJobEvent, JobFailure, JobHyperparameters, Method, Supervised, unix

Level = Literal["info", "warn", "error"]
OF_THE_FILE = ("bad_row", "dataset_changed")
"""Failures that another file would mend."""


def deployment_ids(jobs: Iterable[Job]) -> dict[str, str]:
    """Of jobs that deploy what they have made, the deployment, by job."""
    kind = DeploymentKind.FINE_TUNED
    return {
        job.id: deployment_id(job.client_code, kind, job.model, job.fine_tuned_weights_path)
        for job in jobs
        if job.deploy and job.status is JobStatus.SUCCEEDED
    }


def routed(deployment: Deployment, table: RouteTable) -> bool:
    """Whether a ready deployment can be asked at this process."""
    route = table.get(deployment.id)
    ready = deployment.status is DeploymentStatus.READY
    return not ready or (route is not None and route.revision >= sum(deployment.applied.values()))


def deploying(job: Job, deployment: Deployment | None) -> bool:
    """Whether the job's model is trained, and its first deployment neither ready nor failed. Never again after that."""
    if not job.deploy or job.status is not JobStatus.SUCCEEDED:
        return False
    return deployment is None or (deployment.generation == 1 and deployment.answered == 0)


def job_object(job: Job, deployment: Deployment | None) -> FineTuningJob:
    """The job. It goes on running until its result is deployed, where it is to be."""
    status = JobStatus.RUNNING if deploying(job, deployment) else job.status
    succeeded, parameters = status is JobStatus.SUCCEEDED, job.hyperparameters
    used = JobHyperparameters.model_validate(parameters.model_dump())
    return FineTuningJob(
        id=job.id,
        created_at=unix(job.created_at),
        finished_at=unix(job.finished_at) if job.finished_at and status.final else None,
        estimated_finish=estimated(job) if status is JobStatus.RUNNING else None,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model if succeeded else None,
        organization_id=job.client_code,
        status=status.value,
        error=failure(job),
        hyperparameters=used,
        method=Method(supervised=Supervised(hyperparameters=used)),
        seed=parameters.seed,
        trained_tokens=job.dataset.tokens * parameters.n_epochs if succeeded and job.dataset.tokens else None,
        training_file=job.dataset.id,
        metadata=job.metadata or None,
    )


def failure(job: Job) -> JobFailure | None:
    if job.error is None:
        return None
    param = "training_file" if job.error.code in OF_THE_FILE else None
    return JobFailure(code=job.error.code, message=job.error.message, param=param)


def estimated(job: Job) -> int | None:
    """When training should end, by what the trainer said last."""
    left = job.progress.eta_seconds
    if left is None:
        return None
    return int((datetime.fromisoformat(job.updated_at) + timedelta(seconds=left)).timestamp())


async def history(job: Job, studio: Studio) -> list[FineTuningJobEvent]:
    """Newest first. Only ever added to: a deployment's events come after those of the job that asks for it."""
    told = list(await studio.jobs.history(job.id))
    deployment = deployment_ids([job]).get(job.id)
    if deployment is not None:
        told += first_deployment(await studio.deployments.history(deployment))
    return [event_object(envelope) for envelope in reversed(told)]


def first_deployment(history: Sequence[Envelope[Any]]) -> list[Envelope[Any]]:
    """What was said of a deployment until it was ready for the first time, or could not be."""
    told = []
    for envelope in history:
        told.append(envelope)
        if isinstance(envelope.data, DeploymentReady | DeploymentFailed):
            break
    return told


def event_object(envelope: Envelope[Any]) -> FineTuningJobEvent:
    level, message = line(envelope.data)
    data = metrics(envelope.data)
    return FineTuningJobEvent(
        id=f"ftevent-{envelope.id}",
        created_at=int(envelope.time.timestamp()),
        level=level,
        type="metrics" if data else "message",
        message=message,
        data=data,
    )


def metrics(event: Event) -> dict[str, Any] | None:
    """The numbers of a step."""
    if not isinstance(event, FineTuneProgressed) or event.step is None:
        return None
    return event.model_dump(include={"step", "total_steps", "epoch", "train_loss"}, exclude_none=True)


def line(event: Event) -> tuple[Level, str]:
    """How serious it is, and what to read."""
    match event:
        case FineTuneRequested():
            return "info", f"Created fine-tuning job: {event.job_id}"
        case FineTuneQueued(reason=None):
            return "info", "The job waits for its turn"
        case FineTuneQueued():
            return "warn", f"The job waits: {event.reason}"
        case FineTuneStarted():
            return "info", f"Fine-tuning job started, attempt {event.attempt}"
        case FineTuneProgressed():
            return "info", progress(event)
        case FineTuneSucceeded():
            return "info", f"New fine-tuned model created: {event.fine_tuned_model}"
        case FineTuneFailed():
            return "error", f"The job failed: {event.message}"
        case FineTuneCancelRequested():
            return "info", "The job is to be cancelled"
        case FineTuneCancelled():
            return "info", "The job was cancelled"
        case _:
            return deployment_line(event)


def deployment_line(event: Event) -> tuple[Level, str]:
    match event:
        case DeployRequested():
            return "info", "Deploying the fine-tuned model"
        case DeploymentApplied():
            return "info", "The fine-tuned model is starting"
        case DeploymentReady():
            return "info", "The fine-tuned model answers; the job has successfully completed"
        case DeploymentFailed():
            return "error", f"The fine-tuned model could not be deployed: {event.message}"
    return "info", event.TYPE


def progress(event: FineTuneProgressed) -> str:
    if event.step is not None:
        of = f"/{event.total_steps}" if event.total_steps is not None else ""
        loss = f": training loss={event.train_loss:.4f}" if event.train_loss is not None else ""
        return f"Step {event.step}{of}{loss}"
    if event.tokens is not None:
        return f"The training file has {event.tokens} tokens"
    return event.message or "The training goes on"
