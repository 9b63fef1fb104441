"""What handlers are given, as `Annotated` aliases."""

import re
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import datetime
from typing import Annotated, cast

from fastapi import Depends, Header, Query, Request
from pydantic import AwareDatetime, BeforeValidator

from api.gateway.exchange import Exchanger
from api.gateway.proxy import Plain
from events.base import Cause
from events.types import CLIENT_CODE_PATTERN
from mini_studio.bus.routes import RouteFeed, RouteTable
from mini_studio.errors import NotFound
from mini_studio.wiring import Studio

RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
"""pydantic alone would take bare numbers for times, too."""


def studio(request: Request) -> Studio:
    return cast("Studio", request.app.state.studio)


def route_table(request: Request) -> RouteTable:
    return cast("RouteTable", request.app.state.routes)


def route_feed(request: Request) -> RouteFeed:
    return cast("RouteFeed", request.app.state.feed)


def exchanger(request: Request) -> Exchanger:
    return cast("Exchanger", request.app.state.exchanger)


def plain(request: Request) -> Plain:
    return cast("Plain", request.app.state.plain)


async def until_answered() -> AsyncIterator[ExitStack]:
    """What is entered here is left when the answer has gone out to its end, or when there will be none."""
    with ExitStack() as stack:
        yield stack


def cause(request: Request) -> Cause:
    return cast("Cause", request.state.cause)


TheStudio = Annotated[Studio, Depends(studio)]
Routes = Annotated[RouteTable, Depends(route_table)]
Feed = Annotated[RouteFeed, Depends(route_feed)]
Exchanges = Annotated[Exchanger, Depends(exchanger)]
PlainClient = Annotated[Plain, Depends(plain)]
UntilAnswered = Annotated[ExitStack, Depends(until_answered)]
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


def _with_zone(text: object) -> object:
    if not isinstance(text, str) or not RFC_3339.fullmatch(text):
        raise ValueError("must be an RFC 3339 time with a zone, as 2026-01-31T12:00:00Z is; a + is sent as %2B")
    return text


Moment = Annotated[AwareDatetime | None, BeforeValidator(_with_zone)]
AsOf = Annotated[
    Moment,
    Query(
        description="An RFC 3339 time with a zone: answer from the log, as it was then.",
        examples=["2026-01-31T12:00:00Z"],
    ),
]


def at(as_of: datetime | None) -> str:
    """The end of a message about what was not there at that time."""
    return "" if as_of is None else f" as of {as_of.isoformat()}"


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
