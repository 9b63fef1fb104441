"""The HTTP server under the API: uvicorn with its fast parser, which alone would keep a request's head however long it grows."""

import contextlib
import gc
import socket
from typing import Any

import httptools
import orjson
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api import errors
from api.gateway import head
from api.gateway.ends import ending_when_early, linger
from api.gateway.headers import lines
from api.gateway.protocol import FastGateway, Splice
from api.gateway.wanted import Wanted, wanted_at
from mini_studio.settings import Settings

MAX_HEAD_BYTES = 64 * 1024
TOO_LONG = f"the request line and headers are longer than {MAX_HEAD_BYTES} bytes"
GRACE_S = 15
"""How long requests that run at SIGTERM may go on, streams of a model included."""
LAST_CALL_S = 3.0
"""How long an idle connection stays open at SIGTERM: closed at once, it would cut off a request that is on its way."""


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with three additions.

    It refuses a request whose head does not end or that could be read in two ways, in our shape and in its turn; it hands requests of
    models to the fast path; and it keeps an idle connection's time by one timer, not by a new one for each request.
    """

    cycle: Any
    """The newest request: a cycle of uvicorn's, or a `Splice`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._gateway: FastGateway | None = getattr(getattr(self.config.app, "state", None), "fast", None)
        self.url = b""
        self._in_head = True
        self._unread_bytes = 0
        """What came of a head, or between two pieces of a body."""
        self._piece_bytes = 0
        self._trailer_bytes = 0
        self._most_head_bytes = 0
        """All pieces that a head has a part of."""
        self._between = True
        """The parser is at no request's beginning, nor in one."""
        self._deaf = False
        """Nothing is read any more."""
        self._last_call = False
        self._last_data = 0.0
        self._fresh: Splice | None = None
        """A request of the data just now received, to be started when the rest of it is read."""
        self._active: Splice | None = None
        self.ending = False
        """The connection ends with the answer that is being written: its request is not there to its end."""
        self._refusal: str | None = None
        """Why the connection ends when the answers before are written. Until then nothing is read any more."""
        self._problem: str | None = None
        self._held_up = False
        """The answers so far are still to be read before there is another one."""

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._last_data = self.loop.time()
        if self._between and self._gateway is not None and self._recognized(self._gateway, data):
            return
        self._piece_bytes = len(data)
        self._unread_bytes += self._piece_bytes
        self._most_head_bytes += self._piece_bytes
        fresh_from = self._between
        self._feed(data)
        if self._fresh is not None:
            fresh, self._fresh = self._fresh, None
            if fresh_from and self._gateway is not None:
                self._remember(self._gateway, data, fresh)
            self._run(fresh)
        if self._unread_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(TOO_LONG)

    def _recognized(self, gateway: FastGateway, data: bytes) -> bool:
        """Run a request that came whole and alone, with a head that was parsed before, byte for byte: no need to do so again."""
        at = data.find(b"\r\n\r\n") + 4
        wanted = gateway.heads.get(data[:at])
        if wanted is None or len(data) - at != wanted.length or self._last_call:
            return False
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        self.cycle = self._active = splice = Splice(self, gateway, wanted)
        splice.whole(data[at:])
        splice.start()
        return True

    def _remember(self, gateway: FastGateway, data: bytes, splice: Splice) -> None:
        at = data.find(b"\r\n\r\n") + 4
        wanted = splice.wanted
        plain = wanted.problem is None and not wanted.expects
        if plain and data.startswith(b"POST ") and self._between and len(data) - at == wanted.length:
            gateway.remember(data[:at], wanted)

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                # The parser takes what follows for another protocol's. Nobody here speaks one: it is HTTP still (RFC 9110, 7.8).
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError:
                self.send_400_response("this is no HTTP request")
            return

    def _head_without_upgrade(self) -> bytes:
        kept = [header for header in self.headers if header[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        return b"".join([self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n", lines(kept), b"\r\n"])

    def eof_received(self) -> None:
        if self._active is not None:
            self._active.hung_up()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        waiting: list[Any] = [cycle for cycle, _ in self.pipeline]
        for cycle in waiting:
            if type(cycle) is Splice:
                cycle.hung_up()
        self.pipeline.clear()
        active, self._active = self._active, None
        if active is not None:
            active.hung_up()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    # what the parser calls

    def on_message_begin(self) -> None:
        self._in_head, self._unread_bytes, self._trailer_bytes = True, 0, 0
        self._most_head_bytes = self._piece_bytes
        self._between = False
        self.url = b""
        self.expect_100_continue = False
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes after a body's last chunk never counts, nor does a name that could be mistaken for another one.
        if self._in_head and b"_" not in name:
            super().on_header(name, value)
        elif not self._in_head:
            self._on_trailer(name, value)

    def _on_trailer(self, name: bytes, value: bytes) -> None:
        self._trailer_bytes += len(name) + len(value) + 4
        if self._trailer_bytes > MAX_HEAD_BYTES:
            self._problem = TOO_LONG
            raise head.Unclear(TOO_LONG)
        if name.lower() == b"connection":
            # The parser heeds it all the same, and would read nothing more.
            self.cycle.keep_alive = False

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if self._deaf:
            raise head.Unclear
        try:
            host = head.check(version, method, self.headers)
            target = head.target(self.url, method, host)
            self._check_size()
        except head.Unclear as problem:
            self._problem = str(problem)
            raise
        if self.parser.should_upgrade():
            return
        self._in_head, self._unread_bytes = False, 0
        if self._gateway is not None and method == b"POST" and wanted_at(target):
            old = version == "1.0"
            keep_alive = not old and self.parser.should_keep_alive()
            expects = self.expect_100_continue and not old
            wanted = Wanted(target, self.headers, http_1_0=old, keep_alive=keep_alive, expects=expects)
            self._splice(Splice(self, self._gateway, wanted))
        else:
            self._pass_to_asgi(target)
        if self._last_call:
            self.cycle.keep_alive = False

    def _check_size(self) -> None:
        """That of a head whose end is there, with who knows what around it."""
        if self._most_head_bytes > MAX_HEAD_BYTES:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > MAX_HEAD_BYTES:
                raise head.Unclear(TOO_LONG)

    def _splice(self, splice: Splice) -> None:
        before, self.cycle = self.cycle, splice
        if before is None or before.response_complete:
            self._fresh = splice
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
            self._probe()

    def _pass_to_asgi(self, target: bytes) -> None:
        headers, expects = self.headers, self.expect_100_continue
        super().on_message_begin()
        self.headers.extend(headers)
        self.url, self.expect_100_continue = target, expects
        super().on_headers_complete()
        self._probe()

    def _probe(self) -> None:
        """While nothing is read, since a request waits for its turn, the active one's client must be missed all the same."""
        if self._active is not None and self._gateway is not None:
            self._gateway.watch.probe(self._active)

    def on_body(self, body: bytes) -> None:
        self._unread_bytes = 0
        if type(self.cycle) is Splice:
            self.cycle.on_body(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._between, self._unread_bytes = True, 0
        if type(self.cycle) is Splice:
            self.cycle.on_message_complete()
        else:
            super().on_message_complete()

    # turns

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if type(cycle) is Splice:
            # Not at once: a thousand refused requests in one piece would be as many calls within each other.
            self.loop.call_soon(self._run, cycle)
        else:
            super()._start_asgi_task(cycle, ending_when_early(self, app, cycle))

    def _run(self, splice: Splice) -> None:
        if not self.transport.is_closing():
            self._active = splice
            if self.flow.read_paused:
                self._probe()
            splice.start()

    def on_response_complete(self) -> None:
        self._active = None
        self.server_state.total_requests += 1
        if self.ending:
            self._deaf = True
            self.flow.resume_reading()
            linger(self.loop, self.transport)
            return
        if self.transport.is_closing():
            return
        if self.flow.write_paused:
            # Whoever does not read its answers is asked for no more, nor answered.
            self._held_up = True
            self.flow.pause_reading()
        else:
            self._go_on()

    def _go_on(self) -> None:
        """With the next request: it is here, or has to be read. Of those that wait one piece's are here at most."""
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            if not self.pipeline:
                self.flow.resume_reading()
            self._start_asgi_task(cycle, app)
            return
        self.flow.resume_reading()
        if self._refusal is not None:
            self._write_400(self._refusal)
        elif self.timeout_keep_alive_task is None:
            self._last_data = self.loop.time()
            self._wait_idle(self.timeout_keep_alive)

    # idle connections

    def _wait_idle(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _unset_keepalive_if_required(self) -> None:
        """The timer looks when its time has come; to stop and start it for each request would cost more."""

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self.cycle is not None and not self.cycle.response_complete:
            return
        left_s = self._last_data + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._wait_idle(left_s)
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._last_call = True
            self.loop.call_later(LAST_CALL_S, super().shutdown)
        else:
            super().shutdown()

    # flow

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._active is not None:
            self._active.client_full()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._active is not None:
            self._active.client_writable()
        elif self._held_up:
            self._held_up = False
            self._go_on()

    # refusals

    def send_400_response(self, msg: str) -> None:
        if self._deaf:
            return
        problem, self._problem = self._problem or msg, None
        cycle = self.cycle
        waiting = cycle is not None and not cycle.response_complete
        if not waiting:
            self._write_400(problem)
        elif self._in_head or not cycle.more_body:
            self._refusal, self._deaf = problem, True
        elif self.pipeline:
            self.pipeline.popleft()
            self._refusal, self._deaf = problem, True
        else:
            self._break_body(cycle, problem)

    def _break_body(self, cycle: Any, problem: str) -> None:
        """The body of the very request that is being answered."""
        if type(cycle) is Splice:
            self._fresh = None
            begun = cycle.begun
            cycle.malformed()
        else:
            begun = cycle.response_started
            cycle.disconnected = True
            cycle.message_event.set()
        if begun:
            self.transport.close()
        else:
            self._write_400(problem)

    def _write_400(self, problem: str) -> None:
        content = errors.content(
            400, "bad_request", problem, (), None, openai=self.url.startswith(errors.OPENAI_PATHS.encode())
        )
        body = orjson.dumps(content)
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


def config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How the application is served."""
    return uvicorn.Config(
        app,
        host=settings.api.host,
        port=settings.api.port,
        loop="uvloop",
        http=HttpProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )


def serve(app: FastAPI, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests that run may finish."""
    # What is there now stays: to look through all of it again and again would hold up requests for tens of milliseconds.
    gc.collect()
    gc.freeze()
    inherited = settings.api.listener
    sockets = [socket.socket(fileno=inherited)] if inherited is not None else None
    with contextlib.suppress(KeyboardInterrupt):
        Server(config(app, settings), app).run(sockets=sockets)
