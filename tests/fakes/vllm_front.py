"""vLLM's front without vLLM: the routes, the checks and the order of the middleware of 0.32 and 0.33, and an echo for a model.

As `init_entrypoints_middleware` does, `--middleware` is added last, so it stands outside the check of API keys, which looks at the path.
`tests/vllm/check_vllm.py` asks the same of vLLM itself.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

GUARDED_PREFIX = ("/v1", "/v2", "/inference", "/cohere")
API = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class ApiKeys:
    """`AuthenticationMiddleware`: only some paths are guarded."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        guarded = scope["type"] in ("http", "websocket") and scope["path"].startswith(GUARDED_PREFIX)
        if guarded and Headers(scope=scope).get("Authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, send)
        return self.app(scope, receive, send)


class VllmFront:
    """The application. `bodies` is what reached a route; `hung_up` is set when a client left before its answer."""

    def __init__(self, middleware: Any, *, model: str = "tiny", key: str | None = None) -> None:
        self.model = model
        self.bodies: list[tuple[str, bytes]] = []
        self.hung_up = asyncio.Event()
        self.started = False
        routes = [Route(path, self.answer, methods=["POST"]) for path in (*API, "/invocations")]
        more = [Route("/health", self.health), WebSocketRoute("/v1/realtime", self.realtime)]
        self.app = Starlette(routes=[*routes, *more], lifespan=self.lifespan, exception_handlers={400: openai_error})
        if key:
            self.app.add_middleware(ApiKeys, key=key)
        self.app.add_middleware(middleware)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.started = True
        yield

    async def health(self, request: Request) -> Response:
        return Response()

    async def realtime(self, socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(await socket.receive_text())
        await socket.close()

    async def answer(self, request: Request) -> Response:
        """`validate_json_request`, FastAPI's reading of the body, then the model's name as `_check_model` takes it."""
        if request.headers.get("content-type", "").lower().split(";")[0] != "application/json":
            raise HTTPException(400, "Unsupported Media Type: Only 'application/json' is allowed")
        body = await request.body()
        self.bodies.append((request.url.path, body))
        data = json.loads(body)
        if data.get("model") and data["model"] != self.model and request.url.path != "/invocations":
            error = {"message": "no such model", "type": "NotFoundError", "param": "model", "code": 404}
            return JSONResponse({"error": error}, 404)
        if data.get("waits"):
            await self.until_hung_up(request)
            raise ClientDisconnect
        if data.get("stream"):
            return StreamingResponse(pieces(), media_type="text/event-stream")
        return JSONResponse({"path": request.url.path, "query": request.url.query, "model": self.model})

    async def until_hung_up(self, request: Request) -> None:
        """`with_cancellation`: the body was read, so what comes next is that the client left."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.hung_up.set()


async def pieces() -> AsyncIterator[bytes]:
    for number in range(3):
        yield f"data: {number}\n\n".encode()
        await asyncio.sleep(0)
    yield b"data: [DONE]\n\n"


async def openai_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"message": error.detail, "type": "Bad Request", "param": None, "code": error.status_code}
    return JSONResponse({"error": body}, error.status_code)
