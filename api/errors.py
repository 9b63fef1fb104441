"""The one place that turns errors into HTTP: every failure is `{"ok": false, "error": "<text>", "code": ..., "details": [...]}`.

Under `/v1` it is OpenAI's `{"error": {...}}`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.openai.errors import openai_body, openai_headers, openai_status
from mini_studio.errors import Invalid, RateLimited, StudioError
from schemas.fine_tuning import ErrorResponse

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 2
SHOWN_LENGTH = 300
OPENAI_PATHS = "/v1/"
OPENAI_CODES = {"unauthorized": "invalid_api_key"}


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(StudioError, studio_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientDisconnect, hung_up)


def answer(
    request: Request,
    status: int,
    code: str,
    message: str,
    details: Sequence[dict[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    id = getattr(request.state, "request_id", None)
    openai = request.scope["path"].startswith(OPENAI_PATHS)
    body = content(status, code, message, details, id, openai=openai)
    told = {**(headers or {}), **(openai_headers(status) if openai else {})}
    answered = JSONResponse(body, openai_status(status) if openai else status, headers=told)
    answered.raw_headers.extend(getattr(request.state, "limits", ()))
    return answered


def content(
    status: int, code: str, message: str, details: Sequence[dict[str, Any]], request_id: str | None, *, openai: bool
) -> dict[str, Any]:
    """The body of a failure, in our shape or in OpenAI's."""
    if openai:
        return openai_body(status, OPENAI_CODES.get(code, code), message, details)
    return ErrorResponse(error=message, code=code, details=list(details), request_id=request_id).model_dump()


async def studio_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StudioError)  # noqa: S101
    return answer_to(request, error)


def answer_to(request: Request, error: StudioError) -> JSONResponse:
    response = answer(request, error.status, error.code, error.message, error.details)
    response.raw_headers.extend(headers_of(error))
    return response


def headers_of(error: StudioError) -> list[tuple[bytes, bytes]]:
    """What an error says beside its body: when to come back, and by which scheme to say who one is."""
    if isinstance(error, RateLimited):
        seconds, milliseconds = math.ceil(error.retry_after_s), math.ceil(error.retry_after_s * 1000)
        # OpenAI's clients read the finer one first
        waits = [(b"retry-after", b"%d" % max(1, seconds)), (b"retry-after-ms", b"%d" % max(1, milliseconds))]
        return [*waits, *error.headers]
    if error.status == 503:
        return [(b"retry-after", b"%d" % RETRY_AFTER_S)]
    return [(b"www-authenticate", b"Bearer")] if error.status == 401 else []


async def validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)  # noqa: S101
    invalid = invalid_from(error)
    return answer(request, invalid.status, invalid.code, invalid.message, invalid.details)


def invalid_from(error: RequestValidationError | ValidationError) -> Invalid:
    """One `Invalid` that names each field."""
    details = [{"field": field_of(e), "message": message_of(e)} for e in error.errors()]
    text = "; ".join(f"{d['field']}: {d['message']}" if d["field"] else d["message"] for d in details)
    return Invalid(text[:2000], details=details)


def field_of(error: Any) -> str:
    """The field; `body` if it is wrong as a whole; nothing if the message itself names fields, as our own rules' do."""
    parts = [str(part) for part in error["loc"]]
    if parts and parts[0] in ("body", "path", "query", "header"):
        parts = parts[1:]
    if error["type"] == "json_invalid" or (not parts and error["type"] != "value_error"):
        return "body"
    return ".".join(parts)[:SHOWN_LENGTH]


def message_of(error: Any) -> str:
    if error["type"] == "json_invalid":
        return f"is not JSON: {error.get('ctx', {}).get('error', '')}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "string_pattern_mismatch":
        return f"{message}; got {str(error['input'])[:80]!r}"
    return message


async def http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    texts = {
        404: f"there is no {request.url.path[:200]}"
        + ("; GET /docs lists the endpoints" if request.app.docs_url else ""),
        405: f"{request.method} is not allowed on {request.url.path[:200]}",
    }
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    message = texts.get(error.status_code, str(error.detail)) if error.detail in GENERIC else str(error.detail)
    headers = {"Allow": allowed(request)} if error.status_code == 405 else error.headers
    return answer(request, error.status_code, codes.get(error.status_code, "http_error"), message, headers=headers)


def allowed(request: Request) -> str:
    """Methods of the path, as the API's description has them. Starlette alone names those of the first route that fits."""
    described, path = request.app.openapi()["paths"], request.scope["path"]
    for within in (None, "[^/]+", ".+"):
        fitting = [each for each in described if fits(each, path, within)]
        if fitting:
            return ", ".join(sorted({method.upper() for each in fitting for method in described[each]}))
    return ""


def fits(described: str, path: str, within: str | None) -> bool:
    """Whether a path is one of those described, with `within` as the pattern of its parameters; None: it has none."""
    if within is None:
        return described == path
    return re.fullmatch(re.sub(r"\\\{[^}]*\\\}", lambda _: within, re.escape(described)), path) is not None


async def hung_up(request: Request, error: Exception) -> JSONResponse:
    """For the log: nobody reads the answer."""
    return answer(request, 400, "bad_request", "the client hung up before the end")


GENERIC = ("Not Found", "Method Not Allowed")


async def surprise(request: Request, error: Exception) -> JSONResponse:
    """For whatever nobody foresaw. `RequestContext` calls it: Starlette would outside of all middleware, without the request's id."""
    if isinstance(error, StudioError):
        return answer_to(request, error)
    log.error("request.failed", path=request.url.path, exc_info=error)
    return answer(request, 500, "internal", "something went wrong inside the studio; its log has the details")
