"""Asking a model: the one route that every gateway has."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from api import proxy
from api.deps import Held, Loads, Routes, UntilAnswered, UpstreamClient, UserId
from api.holding import ask
from schemas.fine_tuning import ErrorResponse

router = APIRouter(
    prefix="/inference",
    tags=["inference"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)


@router.post("/infer/{model_name:path}", response_class=StreamingResponse)
async def infer(
    model_name: Annotated[str, Path(max_length=300)],
    request: Request,
    routes: Routes,
    load: Loads,
    holding: Held,
    client: UpstreamClient,
    until_answered: UntilAnswered,
    user: UserId = None,
) -> Response:
    """Forward the JSON body to the model's `/predict`; the answer is passed on as it is, streamed both ways.

    A model that was scaled to zero is woken; the request waits for it, for a while.
    """
    route = proxy.route_for(routes, user, model_name)
    until_answered.enter_context(load.counted(route.name))
    return await ask(request, route, holding, client)
