"""The inference proxy: route by model and client from memory, stream the request up and the answer down."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import httpx
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect

from events.types import DeploymentStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.errors import DeploymentFailed, NotFound, NotReady, Upstream, UpstreamTimeout
from mini_studio.records.routes import Route

PASSED_UP = frozenset((b"content-type", b"accept", b"accept-encoding", b"traceparent", b"content-length"))
KEPT_BACK = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"date",
        b"server",
    )
)
"""Headers of one connection (RFC 9110, 7.6.1), and those our own server writes."""
_turn = itertools.count()


class Refusing(Upstream):
    """The model server takes no connection."""


def route_for(routes: RouteTable, user: str | None, model: str) -> Route:
    """The route, if it can take a request now."""
    route = routes.lookup(user, model)
    if route is None and not routes.loaded:
        raise NotReady("the routes are still being read; try again shortly")
    if route is None:
        who = f"client {user!r}" if user else "callers without X-User-ID"
        raise NotFound(f"no model {model[:200]!r} is deployed for {who}; see GET /inference/deployments")
    return usable(route)


def usable(route: Route) -> Route:
    """The same route, if something answers there, be it after it was woken."""
    if route.status is DeploymentStatus.FAILED:
        raise DeploymentFailed(f"deployment {route.name} failed: {route.message}")
    if not route.endpoints:
        raise NotReady(f"deployment {route.name} is not ready yet; try again shortly")
    return route


async def forward(request: Request, route: Route, client: httpx.AsyncClient) -> StreamingResponse:
    """One request to one of the route's endpoints. Raises `ClientDisconnect` if the client hangs up before the answer begins."""
    endpoint = route.endpoints[next(_turn) % len(route.endpoints)]
    consumed = asyncio.Event()
    content = _request_body(request, consumed)
    url, headers = endpoint + route.predict_path, _request_headers(request)
    upstream = client.build_request("POST", url, headers=headers, content=content)
    sending = asyncio.create_task(client.send(upstream, stream=True))
    leaving = asyncio.create_task(_hung_up(request, consumed))
    try:
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            raise ClientDisconnect
        response = sending.result()
    except httpx.ConnectError as error:
        raise Refusing(f"deployment {route.name} cannot be reached: {error or type(error).__name__}") from None
    except httpx.TimeoutException:
        raise UpstreamTimeout(f"deployment {route.name} did not answer in time") from None
    except httpx.HTTPError as error:
        raise Upstream(f"deployment {route.name} failed to answer: {error or type(error).__name__}") from None
    finally:
        # A send that is cancelled closes its connection: that stops the generation.
        sending.cancel()
        leaving.cancel()
        await asyncio.gather(sending, leaving, return_exceptions=True)
    answer = StreamingResponse(_body(response), response.status_code, background=BackgroundTask(response.aclose))
    answer.raw_headers = _response_headers(response)
    return answer


def _request_headers(request: Request) -> list[tuple[bytes, bytes]]:
    """Bytes as they came, in whatever encoding. The body passes through as it is, so only the caller may ask for a compressed one."""
    passed = [(name, value) for name, value in request.headers.raw if name in PASSED_UP]
    if "accept-encoding" not in request.headers:
        passed.append((b"accept-encoding", b"identity"))
    return [*passed, (b"x-request-id", request.state.request_id.encode())]


def _response_headers(response: httpx.Response) -> list[tuple[bytes, bytes]]:
    """Also repeated ones (`Set-Cookie`), but for those of the upstream's connection."""
    named = {name.strip().lower().encode() for name in response.headers.get("connection", "").split(",")}
    pairs = [(name.lower(), value) for name, value in response.headers.raw]
    return [(name, value) for name, value in pairs if name not in KEPT_BACK and name not in named]


async def _request_body(request: Request, consumed: asyncio.Event) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        yield chunk
    consumed.set()


async def _hung_up(request: Request, consumed: asyncio.Event) -> None:
    """Return when the client is gone. Until the body is consumed, its reader is the one who notices."""
    await consumed.wait()
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(response: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in response.aiter_raw():
            yield chunk
    finally:
        # Also when the client hung up: closing the connection stops the generation.
        await response.aclose()
