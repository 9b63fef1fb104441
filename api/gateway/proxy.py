"""The plain client: httpx, behind FastAPI. It takes the same decisions as the fast one (`exchange.py`), by the libraries' own means."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from api.gateway.exchange import HUNG_UP, KEPT_BYTES, RETRIED, Exchange
from api.gateway.headers import Answered, Headers, passed_up
from api.gateway.watch import now
from mini_studio.errors import StudioError, Upstream, UpstreamTimeout
from mini_studio.settings import Gateway

T = TypeVar("T")
REFUSALS = (httpx.ConnectError, httpx.ConnectTimeout)


class Body:
    """A request's body, which is read before somebody wants it: only who reads hears that the client hangs up.

    Used as a context. No more than `KEPT_BYTES` wait here, and as much is kept so that it can be sent again.
    """

    def __init__(self, receive: Receive, whole: bytes | None = None) -> None:
        """`whole`: the body, where it has been read already."""
        self._receive = receive
        self._pieces: deque[bytes] = deque()
        self._sent: list[bytes] = []
        self._more = whole is None
        self._changed = asyncio.Event()
        self.kept = whole is None or len(whole) <= KEPT_BYTES
        """Whether all that was taken so far is still here."""
        self.touched = now()
        """When somebody last took some of it."""
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the client has hung up, or has sent too much."""
        if whole:
            self._pieces.append(whole)

    async def __aenter__(self) -> Self:
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self.gone.cancel()

    @property
    def complete(self) -> bool:
        """Whether the client has sent all of it."""
        return not self._more

    @property
    def whole(self) -> bytes | None:
        """All of it, if it is here."""
        return None if self._more or not self.kept else b"".join((*self._sent, *self._pieces))

    async def _read(self) -> None:
        try:
            while self._more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                self._pieces.append(message.get("body", b""))
                self._more = message.get("more_body", False)
                self._changed.set()
                while sum(map(len, self._pieces)) > KEPT_BYTES:
                    self._changed.clear()
                    await self._changed.wait()
            while (await self._receive())["type"] != "http.disconnect":
                pass
            raise ClientDisconnect
        except Exception as error:
            self.gone.set_exception(error)

    async def stream(self) -> AsyncIterator[bytes]:
        """From its beginning."""
        for piece in list(self._sent):
            yield piece
        while self._pieces or self._more:
            if not self._pieces:
                self._changed.clear()
                await self._changed.wait()
                continue
            piece = self._pieces.popleft()
            self._changed.set()
            self._keep(piece)
            self.touched = now()
            if piece:
                yield piece

    def _keep(self, piece: bytes) -> None:
        if not self.kept:
            return
        self._sent.append(piece)
        if sum(map(len, self._sent)) > KEPT_BYTES:
            self.kept = False
            self._sent.clear()


class Asking:
    """One exchange through httpx. A context that ends it, whatever comes of it."""

    def __init__(self, request: Request, exchange: Exchange, client: httpx.AsyncClient, settings: Gateway) -> None:
        self._request = request
        self._exchange = exchange
        self._client = client
        self._settings = settings
        self._total = exchange.started + settings.total_s
        self._status = 0
        self._whole = False
        self._silent = False
        self._failure: StudioError | None = None

    def __enter__(self) -> Self:
        self._request.state.limits = self._exchange.limits.headers
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        problem = self._failure or error
        status = self._status or (
            problem.status if isinstance(problem, StudioError) else getattr(error, "status_code", 0)
        )
        failed = (status in RETRIED and bool(self._status)) or isinstance(problem, Upstream) or self._silent
        hung_up = not self._whole and not isinstance(problem, StudioError)
        self._exchange.end(status or HUNG_UP, failed=failed, reason="the client hung up" if hung_up else problem)

    async def answer(self, whole: bytes | None = None) -> StreamingResponse:
        """The model's answer, passed on as it comes. Raises `ClientDisconnect` if the client hangs up before it begins."""
        exchange = self._exchange
        async with Body(self._request.receive, whole) as body:
            response = await self._answered(body)
        try:
            head = Answered(response.headers.raw)
        except Upstream:
            await response.aclose()
            raise
        exchange.began()
        self._status = response.status_code
        answer = StreamingResponse(self._body(response, head), response.status_code)
        answer.raw_headers = self._headers(head)
        return answer

    async def _answered(self, body: Body) -> httpx.Response:
        exchange = self._exchange
        while True:
            endpoint = await self._unless_gone(exchange.placed(body.whole), body)
            try:
                response = await self._sent(endpoint, body)
            except REFUSALS as error:
                await self._unless_gone(exchange.refused(error), body)
                continue
            except httpx.TimeoutException:
                raise self._late() from None
            except httpx.HTTPError as error:
                name = exchange.route.name
                # What the library says may quote the answer.
                raise Upstream(f"deployment {name} failed to answer: {type(error).__name__}") from None
            if response.status_code in RETRIED and body.kept and exchange.moves():
                await response.aclose()
                continue
            return response

    async def _sent(self, endpoint: str, body: Body) -> httpx.Response:
        headers = passed_up(self._request.headers.raw)
        headers.append((b"x-request-id", self._request.state.request_id.encode()))
        content: bytes | AsyncIterator[bytes] | None = body.whole
        if content is None:
            length = self._request.headers.get("content-length")
            headers += [(b"content-length", b"%d" % int(length))] if length else []  # it may have blanks around it
            content = body.stream()
        url = endpoint + self._exchange.route.predict_path
        upstream = self._client.build_request("POST", url, headers=headers, content=content)
        sending = asyncio.create_task(self._client.send(upstream, stream=True))
        try:
            body.touched = now()
            while not sending.done():
                left_s = min(body.touched + self._settings.first_byte_s, self._total) - now()
                if left_s <= 0:
                    late = self._late()
                    # Whoever has not sent the whole body is waited for, not the replica.
                    self._silent = self._silent and body.complete
                    raise late
                await asyncio.wait((sending, body.gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if body.gone.done() and not sending.done():
                    body.gone.result()
            return sending.result()
        finally:
            # A send that is cancelled closes its connection: that stops the generation.
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _unless_gone(self, waiting: Coroutine[Any, Any, T], body: Body) -> T:
        task = asyncio.create_task(waiting)
        try:
            await asyncio.wait(
                (task, body.gone), timeout=max(0.0, self._total - now()), return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                return task.result()
            if body.gone.done():
                body.gone.result()
            raise UpstreamTimeout(f"deployment {self._exchange.route.name} did not finish in time")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _late(self) -> UpstreamTimeout:
        self._silent = now() < self._total
        what = "answer" if self._silent else "finish"
        self._failure = UpstreamTimeout(f"deployment {self._exchange.route.name} did not {what} in time")
        return UpstreamTimeout(self._failure.message)

    def _headers(self, head: Answered) -> Headers:
        bodyless = head.length is None or self._status in (204, 304)
        length = [] if bodyless else [(b"content-length", b"%d" % (head.length or 0))]
        return [*head.headers, *self._exchange.limits.headers, *length]

    async def _body(self, response: httpx.Response, head: Answered) -> AsyncIterator[bytes]:
        pieces = response.aiter_raw().__aiter__()
        try:
            while True:
                left_s = min(self._settings.between_bytes_s, self._total - now())
                try:
                    async with asyncio.timeout(left_s):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    raise self._late() from None
                except httpx.HTTPError as error:
                    self._failure = Upstream(
                        f"deployment {self._exchange.route.name} broke off: {type(error).__name__}"
                    )
                    raise self._failure from None
                if not head.compressed:
                    self._exchange.passed(piece)
                yield piece
            self._whole = True
        finally:
            # Also when the client hung up: closing the connection stops the generation.
            await response.aclose()


class Plain:
    """What the handlers need to ask a model."""

    def __init__(self, client: httpx.AsyncClient, settings: Gateway) -> None:
        self._client = client
        self._settings = settings

    async def ask(
        self, request: Request, exchange: Exchange, until_answered: ExitStack, whole: bytes | None = None
    ) -> StreamingResponse:
        """`whole`: the body that goes to the model; by default the request's own, as it comes."""
        asking = until_answered.enter_context(Asking(request, exchange, self._client, self._settings))
        return await asking.answer(whole)
