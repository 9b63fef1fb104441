"""What surrounds every request: its id, who asks where there are API keys, the body limit, one log line."""

import itertools
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from api.gateway.identity import Identity
from events.base import Cause

log = structlog.get_logger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
UPLOAD_PATHS = ("/fine_tuning/upload-dataset/", "/fine_tuning/submit-finetune", "/v1/files")
"""Bodies that are streamed and limited by the upload settings."""
OPEN_PATHS = frozenset(("/", "/health", "/metrics", "/docs", "/redoc", "/openapi.json"))
ADMIN_PATHS = "/admin/"
"""What needs no API key: it tells nothing of a client, or has a token of its own."""


_PROCESS = uuid.uuid4().hex[:20]
_numbers = itertools.count(1)


def request_id_of(given: str | None) -> str:
    """The caller's `X-Request-ID` where it is well-formed, else a new id: of this process, and counted."""
    if given and REQUEST_ID.fullmatch(given):
        return given
    return f"{_PROCESS}-{next(_numbers):x}"


def cause_of(headers: Headers) -> Cause:
    """The caller's `X-Request-ID` and `traceparent` where they are well-formed, else a new id."""
    trace = headers.get("traceparent", "")
    return Cause(
        correlation_id=request_id_of(headers.get("x-request-id")),
        traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
    )


class RequestContext:
    """ASGI middleware: binds the request id to logs and state, returns it as `X-Request-ID`, limits bodies, answers 500.

    Where there are API keys, what is behind it finds in `X-User-ID` whose key it was, and nobody without one gets behind it.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, identity: Identity) -> None:
        self._app = app
        self._identity = identity
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
            self._identify(scope)
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

    def _identify(self, scope: Scope) -> None:
        """By the path that is routed by. Raises `Unauthorized`, `NotFound` or `BadRequest`."""
        if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(ADMIN_PATHS):
            scope["headers"] = self._identity.headers(scope["headers"])

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        if scope["path"].startswith(UPLOAD_PATHS):
            return receive
        declared = Headers(scope=scope).get("content-length", "0")
        received = int(declared) if declared.isdigit() and int(declared) > self._max_body_bytes else 0

        async def limited() -> Message:
            nonlocal received
            # One that is too large by its own account is not begun: its client may have asked whether to send it.
            message: Message = {} if received > self._max_body_bytes else await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(
                    413, f"the body is larger than {self._max_body_bytes} bytes (MINI_STUDIO_API__MAX_BODY_BYTES)"
                )
            return message

        return limited
