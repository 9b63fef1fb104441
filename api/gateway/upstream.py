"""The fast client's connections to the model servers: HTTP/1.1 on httptools' parser, kept for a moment, driven by callbacks.

A connection is lent to one taker at a time, who writes the request itself and is called back for the answer.
"""

import asyncio
import select
import socket
import ssl
from typing import Protocol
from urllib.parse import urlsplit

import httptools
import structlog

from api.gateway.headers import Answered, Headers
from api.gateway.watch import Watch, now
from mini_studio.errors import Upstream

log = structlog.get_logger(__name__)

KEEP_IDLE_S = 2.0
"""Well below the 5 s after which uvicorn, our model servers' and vLLM's, closes an idle connection: it must not do so under a request."""
JUST_NOW_S = 0.0005
"""For so long nobody asks the system whether an idle connection is still open: the event loop has just heard from it."""
MOST_IDLE = 256
"""Connections kept for one endpoint."""
MAX_HEAD_BYTES = 64 * 1024
MOST_HEADS = 1000
LONGEST_HEAD = 2048
MAX_INTERIM = 16
RDHUP = getattr(select, "POLLRDHUP", 0)


class Taker(Protocol):
    """Who has a connection: for one request and its answer."""

    def answered(self, status: int, head: Answered) -> None:
        """The answer's head is there. It may let go of the connection."""

    def passed(self, data: bytes) -> None:
        """A part of the answer's body."""

    def finished(self) -> None:
        """The answer is whole; the connection is no longer the taker's."""

    def flush(self) -> None:
        """All that arrived in one piece was told."""

    def broke(self, reason: str) -> None:
        """There will be no whole answer; the connection is gone."""

    def upstream_full(self) -> None: ...

    def upstream_writable(self) -> None: ...


class Endpoint:
    """Where one replica is, and the connections to it that nobody uses now."""

    __slots__ = ("host", "idle", "line", "port", "tls")

    def __init__(self, url: str, path: str, *, keep: bool) -> None:
        parts = urlsplit(url)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        closing = "" if keep else "connection: close\r\n"
        self.line = f"POST {parts.path.rstrip('/')}{path} HTTP/1.1\r\nhost: {parts.netloc}\r\n{closing}".encode()
        self.idle: list[Connection] = []


class Pool:
    """Connections to every replica. `keep`: whether they are used again."""

    def __init__(self, watch: Watch, *, connect_s: float, keep: bool) -> None:
        self.watch = watch
        watch.sweep(self._sweep)
        self._connect_s = connect_s
        self.keep = keep
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        self.heads: dict[bytes, tuple[int, Answered]] = {}
        """Of answers that were read and understood, by the very bytes."""

    def endpoint(self, url: str, path: str) -> Endpoint:
        found = self._endpoints.get((url, path))
        if found is None:
            if len(self._endpoints) > 1000:
                self._endpoints = {key: each for key, each in self._endpoints.items() if each.idle}
            found = self._endpoints[url, path] = Endpoint(url, path, keep=self.keep)
        return found

    def idle(self, endpoint: Endpoint) -> "Connection | None":
        """One that is open and fit for the next request, if there is one."""
        while endpoint.idle:
            connection = endpoint.idle.pop()
            if connection.fit():
                return connection
            connection.close()
        return None

    def _sweep(self, time_now: float) -> bool:
        """Close what nobody used for a while. The longest idle one of an endpoint is its first."""
        left = False
        for endpoint in self._endpoints.values():
            idle = endpoint.idle
            old = next((at for at, each in enumerate(idle) if time_now - each.idle_since < KEEP_IDLE_S), len(idle))
            for connection in idle[:old]:
                connection.close()
            del idle[:old]
            left = left or bool(idle)
        return left

    async def connect(self, endpoint: Endpoint) -> "Connection":
        """Raises `OSError`, `TimeoutError` among them."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._connect_s):
            _, connection = await loop.create_connection(
                lambda: Connection(self, endpoint), endpoint.host, endpoint.port, ssl=endpoint.tls
            )
        return connection

    def close(self) -> None:
        for endpoint in self._endpoints.values():
            for connection in endpoint.idle:
                connection.close()
            endpoint.idle.clear()


class Connection(asyncio.Protocol):
    """One connection to a replica."""

    __slots__ = (
        "_answer_done",
        "_endpoint",
        "_fixed",
        "_head",
        "_head_bytes",
        "_headers",
        "_in_trailer",
        "_interim",
        "_interims",
        "_keep_alive",
        "_parser",
        "_paused",
        "_poll",
        "_pool",
        "idle_since",
        "sending",
        "started",
        "taker",
        "transport",
    )

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._parser = httptools.HttpResponseParser(self)
        self._poll = select.poll()
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.taker: Taker | None = None
        self.idle_since = 0.0
        self._paused = False
        self._reset()

    def _reset(self) -> None:
        self._headers: Headers = []
        self._head: Answered | None = None
        self._head_bytes = 0
        self._interim = False
        self._interims = 0
        self._fixed = False
        self._answer_done = False
        self._in_trailer = False
        """Behind a chunk's size, and no byte of it has come: behind the last one's, if anything is wrong there."""
        self._keep_alive = False
        self.sending = False
        """The taker has not sent the whole request yet."""
        self.started = False
        """Whether the answer's head is there."""

    # what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        found: socket.socket | None = transport.get_extra_info("socket")
        if found is not None:
            self._poll.register(found.fileno(), select.POLLIN | RDHUP)

    def data_received(self, data: bytes) -> None:
        taker = self.taker
        if taker is None:
            self.close()
            return
        if self._head_bytes == 0 and not self.started and self._recognized(taker, data):
            return
        first = self._head_bytes == 0 and not self.started
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._in_trailer:
                self._answer_done, self._keep_alive = True, False
            elif not self._answer_done:
                self._fail(_reason(error))
                return
            else:
                self.close()
        if self.taker is not taker:
            return
        if self._answer_done:
            if first:
                self._remember(data)
            self._done()
        elif self._head_bytes > MAX_HEAD_BYTES:
            self._fail(f"its answer has more than {MAX_HEAD_BYTES} bytes beside the body")
        else:
            taker.flush()

    def _recognized(self, taker: Taker, data: bytes) -> bool:
        """Pass on an answer that came whole and alone, with a head that was parsed before, byte for byte."""
        at = data.find(b"\r\n\r\n") + 4
        known = self._pool.heads.get(data[:at])
        if known is None or len(data) - at != known[1].length:
            return False
        status, head = known
        self.started = self._answer_done = self._keep_alive = True
        taker.answered(status, head)
        if self.taker is taker:
            taker.passed(data[at:])
            self._done(parsed=False)
        return True

    def _remember(self, data: bytes) -> None:
        at = data.find(b"\r\n\r\n") + 4
        head = self._head
        if head is None or head.length != len(data) - at or not data.startswith(b"HTTP/1.1 "):
            return
        if self._keep_alive and not self._interims:
            heads = self._pool.heads
            if len(heads) >= MOST_HEADS:
                heads.clear()
            if at <= LONGEST_HEAD:
                heads[data[:at]] = (self._parser.get_status_code(), head)

    def eof_received(self) -> bool:
        taker = self.taker
        if taker is not None and self.started and not self._answer_done and not self._fixed:
            self._answer_done = True
            self.close()
            self._done()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        if self.taker is not None:
            self._fail(f"it closed the connection {'within' if self.started else 'before'} its answer")

    def pause_writing(self) -> None:
        if self.taker is not None:
            self.taker.upstream_full()

    def resume_writing(self) -> None:
        if self.taker is not None:
            self.taker.upstream_writable()

    # what the parser calls

    def on_message_begin(self) -> None:
        if self._answer_done:
            raise Upstream("it answers more than it was asked")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.started:  # else it is a trailer: nobody is told
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            self._interim = True
            self._interims += 1
            if status == 101 or self._interims > MAX_INTERIM:
                raise Upstream("its answer does not come")
            return
        if status > 599:
            raise Upstream(f"its answer has the status {status}")
        head = self._head = Answered(self._headers)
        # Neither length nor chunks: its end is the connection's.
        self._keep_alive = self._pool.keep and self._parser.should_keep_alive()
        self._fixed = head.length is not None or head.chunked or status in (204, 304)
        self.started = True
        if self.taker is not None:
            self.taker.answered(status, head)

    def on_chunk_header(self) -> None:
        self._in_trailer = True

    def on_body(self, data: bytes) -> None:
        self._head_bytes = 0
        self._in_trailer = False
        if self.taker is not None:
            self.taker.passed(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            self._headers = []
        else:
            self._answer_done = True

    # what else happens

    def _done(self, *, parsed: bool = True) -> None:
        """Give it back first: the taker may begin its connection's next request at once."""
        taker, self.taker = self.taker, None
        if self._reusable():
            if parsed:
                self._reset()
            else:
                self.started = self._answer_done = self._keep_alive = False
            self._keep()
        else:
            self.close()
        if taker is not None:
            taker.finished()

    def _reusable(self) -> bool:
        transport = self.transport
        if self.sending or not self._keep_alive or transport.is_closing() or transport.get_write_buffer_size():
            return False
        self.resume()
        return True

    def _keep(self) -> None:
        idle = self._endpoint.idle
        if len(idle) >= MOST_IDLE:
            self.close()
            return
        self.idle_since = now()
        idle.append(self)

    def _fail(self, reason: str) -> None:
        taker, self.taker = self.taker, None
        self.transport.abort()
        if taker is not None:
            taker.broke(reason)

    def pause(self) -> None:
        """Read no more for now: whoever takes the answer is slow."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def fit(self) -> bool:
        """Whether it is open, and nothing came that nobody asked for."""
        if self.transport.is_closing():
            return False
        return now() - self.idle_since < JUST_NOW_S or not self._poll.poll(0)

    def close(self) -> None:
        self.transport.close()

    def drop(self) -> None:
        """The taker does not want the rest: that stops the generation."""
        self.taker = None
        self.transport.abort()


def _reason(error: Exception) -> str:
    cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
    if isinstance(cause, Upstream):
        return str(cause)
    if cause is not error:
        log.error("upstream.failed", exc_info=cause)
    return f"its answer is no HTTP: {error}"
