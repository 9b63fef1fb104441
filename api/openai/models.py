"""`/v1/models`: what the caller can ask now, by the routes in memory."""

from typing import Annotated

from fastapi import APIRouter, Path

from api import deploying
from api.deps import Routes, TheCause, TheStudio
from api.openai.callers import Caller, Client
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.errors import NotFound, NotReady
from mini_studio.records.routes import Route
from schemas.openai import FAILURES, Model, ModelDeleted, ModelList, unix

router = APIRouter(prefix="/v1", tags=["openai"], responses=FAILURES)
"""Every gateway has these."""
removing = APIRouter(prefix="/v1", tags=["openai"], responses=FAILURES)

ModelPath = Annotated[str, Path(max_length=300)]


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "model_not_found"


@router.get("/models")
async def list_models(routes: Routes, client: Caller) -> ModelList:
    """The caller's own models and those that all clients share, each under every name that it answers to."""
    names = {name for route in visible(routes, client) for name in (route.model, route.base_model)}
    found = [(name, asked(routes, client, name)) for name in sorted(names)]
    return ModelList(data=[model(name, route) for name, route in found if route is not None])


@router.get("/models/{model_name:path}")
async def get_model(model_name: ModelPath, routes: Routes, client: Caller) -> Model:
    """One model that the caller can ask."""
    visible(routes, client)
    route = asked(routes, client, model_name)
    if route is None:
        raise missing(model_name, client)
    return model(model_name, route)


@removing.delete("/models/{model_name:path}")
async def delete_model(
    model_name: ModelPath, routes: Routes, client: Client, studio: TheStudio, cause: TheCause
) -> ModelDeleted:
    """Stop serving a fine-tuned model of the client's own. Its job and its weights stay."""
    visible(routes, client)
    route = routes.lookup(client, model_name)
    if route is None or (route.client_code, route.model, route.kind) != (client, model_name, DeploymentKind.FINE_TUNED):
        raise missing(model_name, client)
    await deploying.remove(route.name, client, studio, cause)
    return ModelDeleted(id=model_name)


def visible(routes: RouteTable, client: str | None) -> list[Route]:
    """The routes of the client and of everybody."""
    if not routes.loaded:
        raise NotReady("the routes are still being read; try again shortly")
    return [route for route in routes.all() if route.client_code in ("", client)]


def asked(routes: RouteTable, client: str | None, name: str) -> Route | None:
    """The route that a request for the name would take, if something answers there, be it after it was woken."""
    route = routes.lookup(client, name)
    usable = route is not None and route.status is not DeploymentStatus.FAILED and (route.endpoints or route.asleep)
    return route if usable else None


def model(name: str, route: Route) -> Model:
    return Model(id=name, created=unix(route.requested_at), owned_by=route.client_code or "mini-studio")


def missing(name: str, client: str | None) -> ModelNotFound:
    who = f"client {client!r}" if client else "callers that name no client"
    return ModelNotFound(f"model: there is no model {name[:200]!r} that {who} can ask; GET /v1/models lists them")
