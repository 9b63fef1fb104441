"""Asking a model: the routes that every gateway has. The fast client takes them before they get here (`protocol.py`)."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.responses import StreamingResponse

from api.deps import Exchanges, PlainClient, UntilAnswered, UserId
from api.gateway.dialect import Call, named
from api.gateway.exchange import LONGEST_NAME
from schemas.fine_tuning import ErrorResponse
from schemas.openai import FAILURES

router = APIRouter(
    prefix="/inference",
    tags=["inference"],
    responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
)
openai = APIRouter(prefix="/v1", tags=["openai"], responses=FAILURES)

Authorization = Annotated[
    str | None, Header(description="`Bearer <API key>`: says which client this is, where the studio has keys.")
]
Organization = Annotated[
    str | None, Header(alias="OpenAI-Organization", description="The client, in place of X-User-ID.")
]
CALL = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME},
                        "client_code": {"type": "string", "description": "The client, where no header says it."},
                    },
                    "additionalProperties": True,
                }
            }
        },
    }
}


@router.post("/infer/{model_name:path}", response_class=StreamingResponse)
async def infer(
    model_name: Annotated[str, Path(max_length=LONGEST_NAME)],
    request: Request,
    exchanger: Exchanges,
    plain: PlainClient,
    until_answered: UntilAnswered,
    user: UserId = None,
    authorization: Authorization = None,
) -> Response:
    """Forward the JSON body to the model's `/predict`; the answer is passed on as it is, streamed both ways.

    A model that was scaled to zero is woken; the request waits for it, for a while.
    """
    client = exchanger.identity.client(authorization, user)
    exchange = exchanger.open(request.state.request_id, client, model_name)
    return await plain.ask(request, exchange, until_answered)


@openai.post("/chat/completions", response_class=StreamingResponse, openapi_extra=CALL)
@openai.post("/completions", response_class=StreamingResponse, openapi_extra=CALL)
@openai.post("/embeddings", response_class=StreamingResponse, openapi_extra=CALL)
async def call(
    request: Request,
    exchanger: Exchanges,
    plain: PlainClient,
    until_answered: UntilAnswered,
    user: UserId = None,
    authorization: Authorization = None,
    organization: Organization = None,
) -> Response:
    """Ask a model as OpenAI's clients do; `model` names a deployed one, or the base of the client's own."""
    asked = Call(request.url.path, await request.body())
    client = exchanger.identity.client(authorization, named(organization, user, asked.client_code))
    exchange = exchanger.open(request.state.request_id, client, asked.model, openai=True)
    return await plain.ask(request, exchange, until_answered, asked.body_for(exchange.route))
