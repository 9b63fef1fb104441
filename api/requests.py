"""What surrounds every request: its id, the body limit, one log line."""

import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from events.base import Cause

log = structlog.get_logger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
UPLOAD_PATHS = ("/fine_tuning/upload-dataset/", "/fine_tuning/submit-finetune")
"""Bodies that are streamed and limited by the upload settings."""


def cause_of(headers: Headers) -> Cause:
    """The caller's `X-Request-ID` and `traceparent` where they are well-formed, else a new id."""
    given, trace = headers.get("x-request-id", ""), headers.get("traceparent", "")
    return Cause(
        correlation_id=given if REQUEST_ID.fullmatch(given) else str(uuid.uuid4()),
        traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
    )


class RequestContext:
    """ASGI middleware: binds the request id to logs and state, returns it as `X-Request-ID`, limits bodies, answers 500."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        cause = cause_of(Headers(scope=scope))
        scope.setdefault("state", {}).update(cause=cause, request_id=cause.correlation_id)
        started, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = cause.correlation_id
            await send(message)

        structlog.contextvars.bind_contextvars(request_id=cause.correlation_id)
        try:
            await self._app(scope, self._limited(scope, receive), send_with_id)
        except Exception as error:
            if status:
                raise
            response = await errors.surprise(Request(scope), error)
            await response(scope, receive, send_with_id)
        finally:
            seconds = round(time.perf_counter() - started, 4)
            level = log.debug if scope["path"] in ("/health", "/metrics") else log.info
            level("request.done", method=scope["method"], path=scope["path"], status=status, seconds=seconds)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        if scope["path"].startswith(UPLOAD_PATHS):
            return receive
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(
                    413, f"the body is larger than {self._max_body_bytes} bytes (MINI_STUDIO_API__MAX_BODY_BYTES)"
                )
            return message

        return limited
