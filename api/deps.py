"""What handlers are given, as `Annotated` aliases."""

from typing import Annotated, cast

import httpx
from fastapi import Depends, Header, Request

from events.base import Cause
from events.types import CLIENT_CODE_PATTERN
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.errors import NotFound
from mini_studio.wiring import Studio


def studio(request: Request) -> Studio:
    return cast("Studio", request.app.state.studio)


def route_table(request: Request) -> RouteTable:
    return cast("RouteTable", request.app.state.routes)


def route_feed(request: Request) -> RouteFeed:
    return cast("RouteFeed", request.app.state.feed)


def upstream(request: Request) -> httpx.AsyncClient:
    return cast("httpx.AsyncClient", request.app.state.upstream)


def cause(request: Request) -> Cause:
    return cast("Cause", request.state.cause)


TheStudio = Annotated[Studio, Depends(studio)]
Routes = Annotated[RouteTable, Depends(route_table)]
Feed = Annotated[RouteFeed, Depends(route_feed)]
UpstreamClient = Annotated[httpx.AsyncClient, Depends(upstream)]
TheCause = Annotated[Cause, Depends(cause)]
UserId = Annotated[
    str | None,
    Header(alias="X-User-ID", pattern=CLIENT_CODE_PATTERN, description="The client; decides which routes it sees."),
]
IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="The same key and body give the same result, made once.",
    ),
]


def check_tenant(user: str | None, client_code: str) -> None:
    """A caller that says who it is cannot act as, or look at, another client. Raises `NotFound`."""
    if user is not None and client_code not in ("", user):
        raise NotFound(f"there is no client {client_code!r} for X-User-ID {user!r}")


def check_owner(user: str | None, client_code: str) -> None:
    """A caller that says who it is changes only what is its own, not what all clients share. Raises `NotFound`."""
    check_tenant(user, client_code)
    if user is not None and not client_code:
        raise NotFound(
            f"client {user!r} cannot change what all clients share; send this without X-User-ID and client_code, "
            f"or deploy with client_code {user!r}"
        )
