"""The fast path: a request to a model goes from the client's connection to a replica's, and the answer back, by callbacks alone.

It stands where uvicorn's protocol has a request-response cycle of ASGI (`HttpToolsProtocol.cycle`), and has what that reads of one.
A task is needed only where something is waited for: a deployment that wakes, a connection that is made.
"""

import asyncio
from typing import TYPE_CHECKING, ClassVar

import orjson
import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from api import errors
from api.gateway.dialect import Call, named
from api.gateway.ends import gone, reset
from api.gateway.exchange import HUNG_UP, KEPT_BYTES, RETRIED, Exchange, Exchanger
from api.gateway.headers import Answered, lines
from api.gateway.upstream import Connection, Endpoint, Pool
from api.gateway.wanted import Wanted
from api.gateway.watch import Watch, now
from api.openai.errors import openai_status
from api.requests import request_id_of
from mini_studio.errors import StudioError, TooLarge, Upstream, UpstreamTimeout

if TYPE_CHECKING:
    from api.server import HttpProtocol

log = structlog.get_logger(__name__)

MOST_HEADS = 1000
LONGEST_HEAD = 2048


class FastGateway:
    """What the splices of one process share."""

    def __init__(self, exchanger: Exchanger, *, keep: bool) -> None:
        self.exchanger = exchanger
        self.watch = Watch()
        self.pool = Pool(self.watch, connect_s=exchanger.settings.connect_s, keep=keep)
        self.heads: dict[bytes, Wanted] = {}
        """Of requests that were read and understood, by the very bytes."""
        self._default_headers: list[tuple[bytes, bytes]] = []
        self._default_lines = b""

    def remember(self, head: bytes, wanted: Wanted) -> None:
        if len(self.heads) >= MOST_HEADS:
            self.heads.clear()
        if len(head) <= LONGEST_HEAD:
            self.heads[head] = wanted

    def default_lines(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The server's own headers; uvicorn makes them anew each second."""
        if headers is not self._default_headers:
            self._default_headers, self._default_lines = headers, lines(headers)
        return self._default_lines


class _NoEvent:
    """uvicorn wakes a cycle's task by its event; here is none to wake."""

    def set(self) -> None:
        pass


class Splice:
    """One request of a model and its answer."""

    __slots__ = (
        "_chunked_down",
        "_chunked_up",
        "_compressed",
        "_connection",
        "_exchange",
        "_gateway",
        "_kept",
        "_out",
        "_protocol",
        "_received",
        "_request_id",
        "_stage_s",
        "_status",
        "_task",
        "_total",
        "_upstream_full",
        "_waiting_for_100",
        "body",
        "deadline",
        "disconnected",
        "keep_alive",
        "more_body",
        "response_complete",
        "wanted",
    )
    message_event: ClassVar[_NoEvent] = _NoEvent()

    def __init__(self, protocol: "HttpProtocol", gateway: FastGateway, wanted: Wanted) -> None:
        self.wanted = wanted
        self._protocol = protocol
        self._gateway = gateway
        self._waiting_for_100 = wanted.expects
        self._upstream_full = False
        self._received = 0
        self._exchange: Exchange | None = None
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._chunked_up = False
        self._chunked_down = False
        self._compressed = False
        self._kept = True
        self._out: list[bytes] = []
        self._request_id = ""
        self._status = 0
        self._stage_s = gateway.exchanger.settings.first_byte_s
        self._total = self.deadline = now() + gateway.exchanger.settings.total_s
        self.body: bytes | bytearray = bytearray()
        """What came of the body: all that was not sent yet, and what was as long as it is little."""
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self.keep_alive = wanted.keep_alive

    @property
    def begun(self) -> bool:
        """Whether anything of the answer may have gone out."""
        return bool(self._status)

    # the request

    def whole(self, body: bytes) -> None:
        """All of it came at once."""
        self.body, self._received, self.more_body = body, len(body), False
        self._kept = self._received <= KEPT_BYTES

    def start(self) -> None:
        """It is its turn: all answers before it have been written."""
        self._gateway.watch.add(self)
        wanted = self.wanted
        self._request_id = request_id_of(wanted.request_id)
        try:
            client = self._client(wanted.user)  # whoever has no key is told so before anything of the body is read
            if wanted.path is None:
                self._open(client, wanted.model)
            self._check_size(wanted.length or self._received)
            if wanted.path is None:
                self._dispatch()
        except StudioError as error:
            self.refuse(error)
            return
        except Exception as error:
            self._surprised(error)
            return
        if wanted.path is not None and self.more_body:
            self._invite()
        elif wanted.path is not None:
            self._begin_call()

    def _client(self, caller: str | None) -> str | None:
        if self.wanted.problem is not None:
            raise self.wanted.problem.with_traceback(None)  # the one before would hold on to its request
        return self._gateway.exchanger.identity.client(self.wanted.authorization, caller)

    def _open(self, client: str | None, model: str) -> None:
        self._exchange = self._gateway.exchanger.open(
            self._request_id, client, model, openai=self.wanted.path is not None
        )

    def _begin_call(self) -> None:
        """The body of a call of OpenAI's says which model it is for."""
        wanted = self.wanted
        assert wanted.path is not None  # noqa: S101
        try:
            call = Call(wanted.path, bytes(self.body))
            self._open(self._client(named(wanted.organization, wanted.user, call.client_code)), call.model)
            assert self._exchange is not None  # noqa: S101
            self.body = call.body_for(self._exchange.route)
            self._kept = len(self.body) <= KEPT_BYTES
            self._dispatch()
        except StudioError as error:
            self.refuse(error)
        except Exception as error:
            self._surprised(error)

    def _surprised(self, error: Exception) -> None:
        log.error("exchange.surprised", request_id=self._request_id, exc_info=error)
        self.refuse(StudioError("something went wrong inside the studio; its log has the details"))

    def on_body(self, data: bytes) -> None:
        if self.response_complete:
            return
        self._received += len(data)
        if self._received > self._gateway.exchanger.max_body_bytes:
            if self._request_id:  # else `start` will see it
                self._too_large()
            return
        connection = self._connection
        if connection is None:
            self.body += data
            if self._request_id and self.wanted.path is None and len(self.body) > KEPT_BYTES:
                self._pause_client()
            return
        if self._kept:
            self.body += data
            if len(self.body) > KEPT_BYTES:
                self._kept, self.body = False, bytearray()
        connection.transport.write(_chunk(data) if self._chunked_up else data)
        self._wait(self._stage_s)

    def on_message_complete(self) -> None:
        self.more_body = False
        if self.response_complete or self.disconnected:
            return
        if self._connection is not None:
            if self._chunked_up:
                self._connection.transport.write(b"0\r\n\r\n")
            self._connection.sending = False
        elif self.wanted.path is not None and self._request_id:
            self._begin_call()

    def _too_large(self) -> None:
        try:
            self._check_size(self._received)
        except StudioError as error:
            self.refuse(error)

    def _check_size(self, size: int) -> None:
        limit = self._gateway.exchanger.max_body_bytes
        if size > limit:
            raise TooLarge(f"the body is larger than {limit} bytes (MINI_STUDIO_API__MAX_BODY_BYTES)")

    def _invite(self) -> None:
        """The body is wanted: a client that asked whether it may send it is told so."""
        if self._waiting_for_100 and not self._received:
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._waiting_for_100 = False
        if not self._upstream_full:
            self._protocol.flow.resume_reading()

    def _pause_client(self) -> None:
        self._protocol.flow.pause_reading()
        self._gateway.watch.probe(self)

    # the replica

    def _dispatch(self) -> None:
        exchange = self._exchange
        assert exchange is not None  # noqa: S101
        if exchange.ready():
            exchange.take(None if self.more_body else self.body)
        self._reach()

    def _reach(self) -> None:
        """Send it now, if its replica has a connection that is open; else wait for what there is to wait for."""
        exchange = self._exchange
        assert exchange is not None  # noqa: S101
        if exchange.endpoint is not None:
            endpoint = self._gateway.pool.endpoint(exchange.endpoint, exchange.route.predict_path)
            connection = self._gateway.pool.idle(endpoint)
            if connection is not None:
                self._send(connection, endpoint)
                return
        self.deadline = self._total
        self._task = self._protocol.loop.create_task(self._place(exchange))

    async def _place(self, exchange: Exchange) -> None:
        try:
            connection, endpoint = await self._connected(exchange)
        except StudioError as error:
            self._task = None
            self.refuse(error)
        except Exception as error:
            self._task = None
            self._surprised(error)
        else:
            self._task = None
            self._send(connection, endpoint)

    async def _connected(self, exchange: Exchange) -> tuple[Connection, Endpoint]:
        pool = self._gateway.pool
        while True:
            url = await exchange.placed(None if self.more_body else self.body)
            endpoint = pool.endpoint(url, exchange.route.predict_path)
            connection = pool.idle(endpoint)
            if connection is not None:
                return connection, endpoint
            try:
                connection = await pool.connect(endpoint)
            except OSError as error:
                await exchange.refused(error)
                continue
            if not connection.transport.is_closing():
                return connection, endpoint
            await exchange.refused("it closed the connection at once")

    def _send(self, connection: Connection, endpoint: Endpoint) -> None:
        self._connection = connection
        connection.taker = self
        parts: list[bytes | bytearray] = [
            endpoint.line,
            self.wanted.passed_up,
            b"x-request-id: %b\r\n" % self._request_id.encode(),
        ]
        if not self.more_body:
            parts += (b"content-length: %d\r\n\r\n" % len(self.body), self.body)
            connection.transport.write(b"".join(parts))
        else:
            self._send_beginning(connection, parts)
        self._wait(self._stage_s)
        if self._protocol.flow.write_paused:
            connection.pause()
            self.deadline = self._total

    def _send_beginning(self, connection: Connection, parts: list[bytes | bytearray]) -> None:
        """The rest of the body is still to come."""
        connection.sending = True
        length = self.wanted.length
        self._chunked_up = length is None
        body = bytes(self.body)
        if length is not None:
            parts += (b"content-length: %d\r\n\r\n" % length, body)
        else:
            parts += (b"transfer-encoding: chunked\r\n\r\n", _chunk(body) if body else b"")
        connection.transport.write(b"".join(parts))
        if len(self.body) > KEPT_BYTES:
            self._kept, self.body = False, bytearray()
        self._invite()

    def _wait(self, seconds: float) -> None:
        deadline = now() + seconds
        self.deadline = deadline if deadline < self._total else self._total

    # the answer: what a connection calls

    def answered(self, status: int, head: Answered) -> None:
        exchange, connection = self._exchange, self._connection
        assert exchange is not None and connection is not None  # noqa: S101
        if status in RETRIED and self._kept and exchange.moves():
            self._connection = None
            connection.drop()
            self._reach()
            return
        self._status = status
        self._compressed = head.compressed
        self._stage_s = self._gateway.exchanger.settings.between_bytes_s
        exchange.began()
        self._head(status, head.lines + exchange.limits.lines, head.length)

    def _head(self, status: int, header_lines: bytes, length: int | None) -> None:
        framing = b""
        if status in (204, 304):
            pass
        elif length is not None:
            framing = b"content-length: %d\r\n" % length
        elif self.wanted.http_1_0:
            self.keep_alive = False
        else:
            self._chunked_down = True
            framing = b"transfer-encoding: chunked\r\n"
        if self.more_body:
            self.keep_alive = False
        self._out = [
            STATUS_LINE[status],
            self._gateway.default_lines(self._protocol.server_state.default_headers),
            header_lines,
            b"x-request-id: %b\r\n" % self._request_id.encode(),
            framing,
            b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n",
        ]

    def passed(self, data: bytes) -> None:
        if not self._compressed and self._exchange is not None:
            self._exchange.passed(data)
        self._out.append(_chunk(data) if self._chunked_down else data)

    def flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._protocol.transport.write(b"".join(out))
        if self._status and not self._protocol.flow.write_paused:
            self._wait(self._stage_s)

    def finished(self) -> None:
        self._connection = None
        if self._chunked_down:
            self._out.append(b"0\r\n\r\n")
        self._protocol.transport.write(b"".join(self._out))
        self._end(self._status, failed=self._status in RETRIED)
        self._complete()

    def broke(self, reason: str) -> None:
        self._connection = None
        assert self._exchange is not None  # noqa: S101
        name = self._exchange.route.name
        self.refuse(Upstream(f"deployment {name} failed to answer: {reason}"), failed=True)

    def upstream_full(self) -> None:
        self._upstream_full = True
        if self.more_body:
            self._pause_client()

    def upstream_writable(self) -> None:
        self._upstream_full = False
        if self.more_body:
            self._protocol.flow.resume_reading()

    def client_full(self) -> None:
        if self._connection is not None:
            self._connection.pause()
            self.deadline = self._total

    def client_writable(self) -> None:
        if self._connection is not None:
            self._connection.resume()
            self._wait(self._stage_s)

    # the end

    def refuse(self, error: StudioError, *, failed: bool = False) -> None:
        """Answer with an error of the gateway's own; once an answer has begun, only break it off."""
        self._let_go()
        if self.response_complete or self.disconnected:
            return
        if self._status:
            self._break_off(failed=failed, reason=error)
            return
        openai = self.wanted.path is not None
        status = openai_status(error.status) if openai else error.status
        if status == TooLarge.status:
            self.keep_alive = False
        limits = self._exchange.limits.lines if self._exchange else b""
        headers = lines([(b"content-type", b"application/json"), *errors.headers_of(error)])
        body = orjson.dumps(
            errors.content(error.status, error.code, error.message, error.details, self._request_id, openai=openai)
        )
        self._head(status, headers + limits, len(body))
        self._protocol.transport.write(b"".join([*self._out, body]))
        self._end(status, failed=failed, reason=error if status >= 500 else None)
        self._complete()

    def malformed(self) -> None:
        """The rest of the body cannot be understood; what was sent of it is worth nothing. The protocol answers."""
        self._let_go()
        self._end(self._status or 400)
        self.response_complete = True

    def hung_up(self) -> None:
        """The client is gone: nothing is generated for nobody."""
        self.disconnected = True
        self._let_go()
        self._end(self._status or HUNG_UP, reason=None if self.response_complete else "the client hung up")

    def expire(self) -> None:
        exchange = self._exchange
        if exchange is None:
            self.hung_up()
            self._protocol.transport.abort()
            return
        silent = self._connection is not None and self.deadline < self._total
        what = "did not answer in time" if silent else "did not finish in time"
        # Whoever has not sent the whole body is waited for, not the replica.
        blamed = silent and not self.more_body
        self.refuse(UpstreamTimeout(f"deployment {exchange.route.name} {what}"), failed=blamed)

    def probe(self) -> None:
        """While nothing is read of the client, only the state of its connection says that it is gone."""
        protocol = self._protocol
        if (
            not protocol.flow.read_paused
            or self.response_complete
            or self.disconnected
            or protocol.transport.is_closing()
        ):
            self._gateway.watch.unprobe(self)
        elif gone(protocol.transport):
            self.hung_up()
            protocol.transport.abort()

    def _break_off(self, *, failed: bool, reason: object) -> None:
        """The client must not take what it has for the whole answer."""
        transport = self._protocol.transport
        if self._out:
            transport.write(b"".join(self._out))
        self._end(self._status, failed=failed, reason=reason)
        self.response_complete = True
        if self.wanted.http_1_0 or self._protocol.flow.write_paused:
            reset(transport)
        else:
            transport.close()

    def _let_go(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    def _end(self, status: int, *, failed: bool = False, reason: object = None) -> None:
        self._gateway.watch.discard(self)
        self._gateway.watch.unprobe(self)
        if self._exchange is not None:
            self._exchange.end(status, failed=failed, reason=reason)

    def _complete(self) -> None:
        self.response_complete = True
        protocol = self._protocol
        if self.more_body:
            protocol.ending = True
        elif not self.keep_alive:
            protocol.transport.close()
        protocol.on_response_complete()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)
