"""Who asks: OpenAI's clients name an organisation where the studio has clients."""

import re
from typing import Annotated

from fastapi import Depends, Header, Query

from api.deps import UserId
from api.gateway.dialect import same
from events.types import CLIENT_CODE_PATTERN
from mini_studio.errors import BadRequest, Invalid

HOW = (
    "say for which client: OpenAI(organization=...), which sends the header OpenAI-Organization, or the header X-User-ID, "
    "or client_code in extra_query or extra_body"
)

Organization = Annotated[
    str | None,
    Header(alias="OpenAI-Organization", pattern=CLIENT_CODE_PATTERN, description="The client, as `X-User-ID` says it."),
]
ClientQuery = Annotated[str | None, Query(pattern=CLIENT_CODE_PATTERN, description="The client.")]


def required(*named: str | None) -> str:
    """The client. Raises `BadRequest` when nobody was named."""
    client = same(*named)
    if client is None:
        raise BadRequest(HOW)
    return client


def caller(user: UserId = None, organization: Organization = None, client_code: ClientQuery = None) -> str | None:
    return same(user, organization, client_code)


Caller = Annotated[str | None, Depends(caller)]


def own(client: Caller) -> str:
    return required(client)


Client = Annotated[str, Depends(own)]


def in_form(fields: dict[str, str]) -> str | None:
    """The client that a form names. Raises `Invalid` for what is no client code."""
    named = fields.get("client_code") or None
    if named is not None and not re.fullmatch(CLIENT_CODE_PATTERN, named):
        raise Invalid(f"client_code: must match {CLIENT_CODE_PATTERN}")
    return named
