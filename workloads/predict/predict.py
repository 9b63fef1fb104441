"""`POST /predict` on vLLM's API server, loaded with `--middleware predict.Predict`.

A request goes to `/v1/chat/completions`, `/v1/completions` or `/v1/embeddings`, by which of `messages`, `prompt` and `input` it has; the
rules and the errors are those of `workloads.serve`. The body goes on byte for byte (without `model`, vLLM takes the one it serves) and
the answer is not touched. vLLM puts this outside its own middleware, so API keys are checked for the path that the request goes on to.

`/invocations` does not exist: API keys do not guard it, and it answers for models that are not there.

This file runs in vLLM's image, by itself: it imports the standard library only.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions", "input": "/v1/embeddings"}
MAX_BODY = 16 * 1024 * 1024


class BadInput(Exception):
    """A request that cannot go on, in OpenAI's error shape."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status

    def body(self) -> bytes:
        error = {"message": str(self), "type": "invalid_request_error", "param": None, "code": None}
        return json.dumps({"error": error}).encode()


class Predict:
    """The middleware. It holds one body at a time for each request, and lets go of it when vLLM has read it."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"].rstrip("/") == "/invocations":
            await refuse(BadInput("there is no /invocations here; use /predict or /v1", status=404), send)
        elif scope["path"] == "/predict" and scope["method"] == "POST":
            await self._predict(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _predict(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            body = await read(receive)
            if body is None:
                return  # the client hung up: there is nobody to answer
            path = path_for(body)
        except BadInput as error:
            await refuse(error, send)
            return
        await self._app(going_to(path, scope), after(body, receive), send)


async def read(receive: Receive) -> bytes | None:
    """The whole body; None when the client hung up. Raises `BadInput` as soon as it is too large."""
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise BadInput(f"the body is larger than {MAX_BODY} bytes", status=413)
        if not message.get("more_body", False):
            return bytes(body)
    return None


def path_for(body: bytes) -> str:
    """Where a request of this shape goes. Raises `BadInput`."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise BadInput("the body is not JSON") from None
    if not isinstance(data, dict):
        raise BadInput("the body must be a JSON object")
    shapes = [name for name in PATHS if name in data]
    if len(shapes) != 1:
        raise BadInput("give either messages (chat), prompt (completion) or input (embeddings)")
    return PATHS[shapes[0]]


def going_to(path: str, scope: Message) -> Message:
    """The request at another path. `/predict` takes JSON whatever it is called; vLLM wants its name."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    headers.append((b"content-type", b"application/json"))
    return {**scope, "path": path, "raw_path": path.encode(), "headers": headers}


def after(body: bytes, receive: Receive) -> Receive:
    """What the server has to say after a body that was read already: the body first, then for example that the client left."""
    unread = [body]

    async def next_message() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return next_message


async def refuse(error: BadInput, send: Send) -> None:
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
