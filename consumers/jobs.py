"""Consumer `jobs`: job records follow the log, and the result of a job that wants it is deployed."""

from typing import Any

from events.base import Envelope
from events.deployments import Scale
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
from events.types import JobStatus
from mini_studio.bus.consumer import Consumer
from mini_studio.records.deployments import of_job
from mini_studio.records.record import ANYONE
from mini_studio.settings import Serving
from mini_studio.wiring import Studio

consumer = Consumer("jobs")
THRESHOLD = 5.0
"""Waiting requests a replica, as a deploy request has it by default; there is one replica at most."""


@consumer.projects(
    FineTuneRequested,
    FineTuneCancelRequested,
    FineTuneQueued,
    FineTuneStarted,
    FineTuneProgressed,
    FineTuneSucceeded,
    FineTuneFailed,
    FineTuneCancelled,
)
async def project(envelopes: list[Envelope[Any]], studio: Studio) -> None:
    """Apply the events to their job records, and deploy what they say is there to be served."""
    await studio.jobs.apply_all(envelopes)
    succeeded = {envelope.subject: envelope for envelope in envelopes if isinstance(envelope.data, FineTuneSucceeded)}
    if succeeded:
        await deploy(succeeded, studio)


async def deploy(succeeded: dict[str, Envelope[Any]], studio: Studio) -> None:
    """Request, once for ever, the deployments of those jobs that were submitted to be served."""
    jobs = (await studio.jobs.get_all(ANYONE, list(succeeded))).values()
    wanted = [job for job in jobs if job.deploy and job.status is JobStatus.SUCCEEDED]
    if not wanted:
        return
    events = {job.id: of_job(job, scale(studio.settings.serving)) for job in wanted}
    known = await studio.deployments.get_all(ANYONE, [event.deployment_id for event in events.values()])
    for job in wanted:
        event = events[job.id]
        if event.deployment_id not in known:
            await studio.deployments.request_once(job.client_code, event, succeeded[job.id].follows())


def scale(serving: Serving) -> Scale:
    least = serving.tuned_min_replicas
    without = serving.driver == "kubernetes" and serving.kubernetes.runtime == "studio"
    return Scale(
        gpu_count=0 if without else serving.tuned_gpus,
        min_replicas=least,
        max_replicas=max(1, least),
        prometheus_threshold=THRESHOLD,
    )
