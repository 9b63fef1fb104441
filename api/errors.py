"""The one place that turns errors into HTTP: every failure is `{"ok": false, "error": "<text>", "code": ..., "details": [...]}`."""

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mini_studio.errors import Invalid, StudioError
from schemas.fine_tuning import ErrorResponse

log = structlog.get_logger(__name__)

RETRY_AFTER_S = 2
SHOWN_LENGTH = 300


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
    body = ErrorResponse(
        error=message, code=code, details=list(details), request_id=getattr(request.state, "request_id", None)
    )
    return JSONResponse(body.model_dump(), status, headers=headers)


async def studio_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StudioError)  # noqa: S101
    headers = {503: {"Retry-After": str(RETRY_AFTER_S)}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
    return answer(request, error.status, error.code, error.message, error.details, headers)


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
    return answer(
        request, error.status_code, codes.get(error.status_code, "http_error"), message, headers=error.headers
    )


async def hung_up(request: Request, error: Exception) -> JSONResponse:
    """For the log: nobody reads the answer."""
    return answer(request, 400, "bad_request", "the client hung up before the end")


GENERIC = ("Not Found", "Method Not Allowed")


async def surprise(request: Request, error: Exception) -> JSONResponse:
    """For whatever nobody foresaw. `RequestContext` calls it: Starlette would outside of all middleware, without the request's id."""
    log.error("request.failed", path=request.url.path, exc_info=error)
    return answer(request, 500, "internal", "something went wrong inside the studio; its log has the details")
