"""What a deployment request does behind its handler: choose the identity and the name, then wait, bounded, for the first status."""

import asyncio
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from fastapi import Response
from pydantic import TypeAdapter, ValidationError

from api.deps import at, check_owner
from events.base import Cause
from events.deployments import DeployRequested
from events.types import DeploymentKind, DeploymentStatus, ModelName, derived_id
from mini_studio.bus.routes import RouteFeed
from mini_studio.errors import Conflict, Invalid, NotFound, Refused
from mini_studio.records.deployments import Deployment, deployment_id, readable_name, removal
from mini_studio.records.idempotency import fingerprint
from mini_studio.records.jobs import Job
from mini_studio.records.projection import timestamp
from mini_studio.records.record import ANYONE
from mini_studio.wiring import Studio
from schemas.inference import BaseModelDeployRequest, DeployResponse, DeployScale, FineTunedDeployRequest
from workloads.specs import COMMITTED

LOOK_EVERY_S = 0.05
ROUTE_S = 1.0
BROKER_PATIENCE_S = 1.5
"""How long a request's event may stand in the outbox before the request stops waiting for what follows from it."""


async def request(
    studio: Studio, body: DeployScale, tenant: str, event: DeployRequested, key: str | None, cause: Cause
) -> Deployment:
    """Ask for the deployment, once for an Idempotency-Key: a repeat finds it as it is by now, and changes nothing."""
    if key:
        present = await studio.deployments.get(ANYONE, event.deployment_id)
        generation = present.generation if present else 0
        value, at = fingerprint(type(body).__name__, body.model_dump_json()), timestamp(datetime.now(UTC))
        claimed = await studio.keys.claim(tenant, "deploy", key, value, cause=cause, at=at, generation=generation + 1)
        if present and generation >= claimed.generation:
            return present
    return await studio.deployments.request(tenant, event, cause)


def base_event(body: BaseModelDeployRequest) -> DeployRequested:
    kind = DeploymentKind.BASE
    return DeployRequested(
        deployment_id=deployment_id(body.client_code, kind, body.model_id, None),
        generation=1,
        name=readable_name(kind, body.client_code, body.model_id),
        kind=kind,
        model=body.model_id,
        base_model=body.model_id,
        scale=body.scale(),
    )


async def fine_tuned_event(body: FineTunedDeployRequest, studio: Studio) -> DeployRequested:
    """The request for weights below the client's own folder; the job that made them names the model."""
    kind, path = DeploymentKind.FINE_TUNED, confined(body, studio)
    job = await job_of(path, studio)
    if job is not None and job.model != body.base_model:
        raise Invalid(f"base_model: these weights were trained from {job.model!r}, not {body.base_model!r}")
    model = job.fine_tuned_model if job else name_of(path, body)
    return DeployRequested(
        deployment_id=deployment_id(body.client_code, kind, body.base_model, str(path)),
        generation=1,
        name=readable_name(kind, body.client_code, body.base_model),
        kind=kind,
        model=model,
        base_model=body.base_model,
        weights_path=str(path),
        scale=body.scale(),
    )


def confined(body: FineTunedDeployRequest, studio: Studio) -> Path:
    """The path, if it names an existing folder below the client's own; links are followed first."""
    own = studio.settings.models / body.client_code
    given = body.fine_tuned_weights_path
    hint = f"must be a folder below {own}, as a succeeded job's fine_tuned_weights_path is"
    if "\x00" in given or not given.startswith("/"):
        raise Invalid(f"fine_tuned_weights_path: {hint}")
    path = Path(os.path.normpath(given))
    real = Path(os.path.realpath(path))
    # not Path.is_dir, which raises where a name is too long
    if own not in path.parents or own not in real.parents or not os.path.isdir(real):  # noqa: PTH112
        raise Invalid(f"fine_tuned_weights_path: {hint}; there is none at {given[:300]!r}")
    return path


async def job_of(path: Path, studio: Studio) -> Job | None:
    """The job whose result this is, `<models root>/<client>/<job id>/model`. Its record may not know of its success yet."""
    tenant, id, *rest = path.relative_to(studio.settings.models).parts
    return await studio.jobs.get(tenant, id) if rest == [COMMITTED] else None


def name_of(path: Path, body: FineTunedDeployRequest) -> str:
    """The model's name where no job gave it one."""
    name = f"ft:{body.base_model}:{body.client_code}:{weights_label(path)}"
    try:
        return TypeAdapter(ModelName).validate_python(name)
    except ValidationError:
        raise Invalid(f"base_model: too long, or of too many parts, to name the model {name[:300]!r}") from None


def weights_label(path: Path) -> str:
    """A model-name part made of the folder's name; folders of one name differ in its end."""
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in path.name)[:60].strip("-")
    return f"{kept or 'weights'}-{derived_id('', str(path))[-8:]}"


async def answer(
    deployment: Deployment, studio: Studio, feed: RouteFeed, response: Response, prefer: str | None
) -> DeployResponse:
    """Wait for the first status of this generation, unless the caller does not want to."""
    generation = deployment.generation
    if "respond-async" not in (prefer or ""):
        deployment = await first_status(deployment, studio, feed)
        if deployment.status is not DeploymentStatus.DEPLOYING:
            # A caller that asks the model right after this answer must not hear that there is none.
            await feed.read_until(lambda table: table.knows(deployment.id), ROUTE_S)
    if deployment.generation != generation or deployment.status in (
        DeploymentStatus.REMOVING,
        DeploymentStatus.REMOVED,
    ):
        now = f"{deployment.status.value}, generation {deployment.generation}"
        raise Conflict(f"another request has changed {deployment.name} since; it is {now}")
    if deployment.status is DeploymentStatus.FAILED:
        raise Refused(f"{deployment.name}: {deployment.message}")
    deploying = deployment.status is DeploymentStatus.DEPLOYING
    url = f"/inference/deployments/{deployment.name}"
    if deployment.client_code:
        url += f"?client_code={deployment.client_code}"
    if deploying:
        response.status_code = 202
        response.headers["Location"] = url
    return DeployResponse(
        status="deploying" if deploying else "deployed",
        deployment=deployment.name,
        model=deployment.model,
        status_url=url,
    )


async def first_status(deployment: Deployment, studio: Studio, feed: RouteFeed) -> Deployment:
    """The deployment with this generation's first status, or as it is when there is nothing more to wait for."""
    asked = time.monotonic()
    awaited = (DeploymentStatus.DEPLOYING, deployment.generation)
    while (deployment.status, deployment.generation) == awaited and not studio.leaving:
        patience_s = BROKER_PATIENCE_S if deployment.outbox else studio.settings.api.deploy_wait_s
        broker_away = studio.relay.problem or feed.problem
        if broker_away or time.monotonic() - asked > patience_s:
            break
        await asyncio.sleep(LOOK_EVERY_S)
        deployment = await studio.deployments.get(ANYONE, deployment.id) or deployment
    return deployment


async def visible(name: str, tenant: str, studio: Studio, as_of: datetime | None = None) -> Deployment:
    """The deployment, as it is or was, if it is shared or the tenant's own."""
    deployment = await studio.deployments.named(tenant, name)
    if deployment is not None and as_of is not None:
        deployment = await studio.deployments.at(ANYONE, deployment.id, as_of)
    if deployment is None:
        raise NotFound(
            f"there is no deployment {name!r} for client {tenant!r}{at(as_of)}; give client_code or X-User-ID"
        )
    return deployment


async def remove(name: str, tenant: str, studio: Studio, cause: Cause) -> Deployment:
    deployment = await visible(name, tenant, studio)
    check_owner(tenant or None, deployment.client_code)
    if deployment.status is DeploymentStatus.REMOVED:
        raise Conflict(f"deployment {name!r} is removed already")
    changed = await studio.deployments.change(
        deployment.client_code, deployment.id, lambda present: removal(present, cause)
    )
    return changed or deployment
