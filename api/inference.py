"""Deployments."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from api import deploying
from api.deps import (
    AsOf,
    Feed,
    IdempotencyHeader,
    TheCause,
    TheStudio,
    UserId,
    check_owner,
    check_tenant,
)
from events.types import DeploymentId, DeploymentName, Owner
from schemas.fine_tuning import ErrorResponse
from schemas.inference import (
    BaseModelDeployRequest,
    DeploymentListResponse,
    DeploymentResponse,
    DeploymentView,
    DeployResponse,
    FineTunedDeployRequest,
)

router = APIRouter(
    prefix="/inference",
    tags=["inference"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)

Prefer = Annotated[str | None, Header(description="`respond-async`: answer 202 at once.")]


ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {"model": DeployResponse, "description": "Not waited for to the end: see `status_url`."}
}


@router.post("/deploy/base", responses=ACCEPTED)
async def deploy_base(
    body: BaseModelDeployRequest,
    response: Response,
    studio: TheStudio,
    feed: Feed,
    cause: TheCause,
    key: IdempotencyHeader = None,
    prefer: Prefer = None,
    user: UserId = None,
) -> DeployResponse:
    """Serve a base model, for one client or (empty `client_code`, and no `X-User-ID`) for all."""
    check_owner(user, body.client_code)
    event = deploying.base_event(body)
    deployment = await deploying.request(studio, body, body.client_code, event, key, cause)
    return await deploying.answer(deployment, studio, feed, response, prefer)


@router.post("/deploy/fine_tuned", responses=ACCEPTED)
async def deploy_fine_tuned(
    body: FineTunedDeployRequest,
    response: Response,
    studio: TheStudio,
    feed: Feed,
    cause: TheCause,
    key: IdempotencyHeader = None,
    prefer: Prefer = None,
    user: UserId = None,
) -> DeployResponse:
    """Serve a client's fine-tuned weights."""
    check_tenant(user, body.client_code)
    event = await deploying.fine_tuned_event(body, studio)
    deployment = await deploying.request(studio, body, body.client_code, event, key, cause)
    return await deploying.answer(deployment, studio, feed, response, prefer)


@router.get("/deployments")
async def list_deployments(
    studio: TheStudio,
    user: UserId = None,
    client_code: Owner = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: DeploymentId | None = None,
    as_of: AsOf = None,
) -> DeploymentListResponse:
    """A client's own deployments, or (empty `client_code`) those that all share; newest first.

    With `as_of`, those that there were then, as their events up to then had them.
    """
    check_tenant(user, client_code)
    found = await studio.deployments.page_at(user or client_code, as_of, limit=limit + 1, after=after)
    views = [DeploymentView.model_validate(deployment) for deployment in found[:limit]]
    return DeploymentListResponse(
        deployments=views, has_more=len(found) > limit, last_id=views[-1].id if views else None
    )


@router.get("/deployments/{name}")
async def get_deployment(
    name: DeploymentName, studio: TheStudio, user: UserId = None, client_code: Owner = "", as_of: AsOf = None
) -> DeploymentResponse:
    """One deployment: shared, or the client's own.

    With `as_of` it is answered from the log: the deployment as its events up to that time had it, 404 before its first one.
    """
    check_tenant(user, client_code)
    deployment = await deploying.visible(name, user or client_code, studio, as_of)
    return DeploymentResponse(deployment=DeploymentView.model_validate(deployment))


@router.delete("/deployments/{name}", status_code=202)
async def delete_deployment(
    name: DeploymentName, studio: TheStudio, cause: TheCause, user: UserId = None, client_code: Owner = ""
) -> DeploymentResponse:
    """Stop serving it. Its name and identity stay its own. What all clients share is removed without naming one."""
    check_tenant(user, client_code)
    deployment = await deploying.remove(name, user or client_code, studio, cause)
    return DeploymentResponse(deployment=DeploymentView.model_validate(deployment))
