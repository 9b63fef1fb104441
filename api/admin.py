"""For who runs the studio, not for its clients: dead letters."""

import hmac
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.deps import TheStudio, UserId
from mini_studio.bus.dead_letters import DeadLetter, State
from mini_studio.errors import NotFound, Unauthorized
from schemas.dead_letters import (
    Content,
    DeadLetterDetail,
    DeadLetterListResponse,
    DeadLetterResponse,
    DeadLetterView,
    HeaderView,
    RedriveResponse,
)
from schemas.fine_tuning import ErrorResponse

bearer = HTTPBearer(auto_error=False, description="The value of MINI_STUDIO_API__ADMIN_TOKEN, where it is set.")


def check_admin(
    studio: TheStudio,
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    user: UserId = None,
) -> None:
    """Where a token is set a caller needs it; one that names itself as a client sees nothing here even so."""
    wanted = studio.settings.api.admin_token
    if wanted is not None and not hmac.compare_digest(
        given.credentials.encode() if given else b"", wanted.get_secret_value().encode()
    ):
        raise Unauthorized
    if user is not None:
        raise NotFound("there is no such thing for a client")


router = APIRouter(
    prefix="/admin",
    tags=["admin"],
    dependencies=[Depends(check_admin)],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)

LetterId = Annotated[str, Path(max_length=200)]


@router.get("/dead-letters")
async def list_dead_letters(
    studio: TheStudio,
    consumer: Annotated[str | None, Query(max_length=100, description="Only this consumer's.")] = None,
    state: State = "open",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=200)] = None,
) -> DeadLetterListResponse:
    """What consumers could never handle, newest first."""
    found = await studio.dead_letters.page(consumer=consumer, state=state, limit=limit + 1, after=after)
    letters = [DeadLetterView.model_validate(summary(letter)) for letter in found[:limit]]
    last_id = letters[-1].id if letters else None
    return DeadLetterListResponse(dead_letters=letters, has_more=len(found) > limit, last_id=last_id)


@router.get("/dead-letters/{id}")
async def get_dead_letter(id: LetterId, studio: TheStudio) -> DeadLetterResponse:
    """One dead letter with its record, byte for byte."""
    return DeadLetterResponse(dead_letter=detail(await studio.dead_letters.get(id)))


@router.post("/dead-letters/redrive")
async def redrive_dead_letters(
    studio: TheStudio, consumer: Annotated[str, Query(max_length=100, description="Whose.")]
) -> RedriveResponse:
    """Put all open dead letters of a consumer back, for it alone; do so when their cause is gone."""
    return RedriveResponse(redriven=await studio.dead_letters.redrive_all(consumer))


@router.post("/dead-letters/{id}/redrive")
async def redrive_dead_letter(id: LetterId, studio: TheStudio) -> DeadLetterResponse:
    """Put one dead letter back, for its consumer alone; 409 when that was done before."""
    return DeadLetterResponse(dead_letter=detail(await studio.dead_letters.redrive(id)))


def summary(letter: DeadLetter) -> dict[str, object]:
    fields = ("id", "consumer", "reason", "time", "topic", "partition", "offset", "size")
    headers = {"event_id": "ce_id", "event_type": "ce_type", "subject": "ce_subject"}
    return {
        **{name: getattr(letter, name) for name in fields},
        **{name: letter.header(header) for name, header in headers.items()},
        "state": "redriven" if letter.redriven else "open",
    }


def detail(letter: DeadLetter) -> DeadLetterDetail:
    headers = [HeaderView(name=name, value=Content.of(value)) for name, value in letter.headers]
    record = {"key": Content.of(letter.key), "headers": headers, "value": Content.of(letter.value)}
    return DeadLetterDetail.model_validate({**summary(letter), **record})
