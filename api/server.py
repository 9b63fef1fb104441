"""The HTTP server under the API: uvicorn with its fast parser, which alone would keep a request's head however long it grows."""

import contextlib
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mini_studio.settings import Settings
from schemas.fine_tuning import ErrorResponse

MAX_HEAD_BYTES = 64 * 1024
GRACE_S = 15
"""How long requests that run at SIGTERM may go on, streams of a model included."""
LAST_CALL_S = 3.0
"""How long an idle connection stays open at SIGTERM: closed at once, it would cut off a request that is on its way."""


class HttpProtocol(HttpToolsProtocol):
    """Ends a request whose head does not end, and says what is wrong with one that is no HTTP in our shape."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = True
        self._head_bytes = 0
        self._last_call = False

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"the request line and headers are longer than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        if self._last_call:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._last_call = True
            self.loop.call_later(LAST_CALL_S, super().shutdown)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        body = ErrorResponse(error=msg, code="bad_request").model_dump_json(exclude_none=True).encode()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Tells the application that it is about to end, so that nobody waits in vain for what comes later."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.leave()
        await super().shutdown(sockets)


def serve(app: FastAPI, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests that run may finish."""
    config = uvicorn.Config(
        app,
        host=settings.api.host,
        port=settings.api.port,
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    inherited = settings.api.listener
    with contextlib.suppress(KeyboardInterrupt):
        Server(config, app).run(sockets=[socket.socket(fileno=inherited)] if inherited is not None else None)
