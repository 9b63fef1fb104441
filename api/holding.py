"""Requests for a deployment that sleeps, or that cannot be reached just now, wait here: their number is what wakes it."""

import asyncio
from collections import Counter, deque

import httpx
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from api import proxy
from events.types import DeploymentStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.errors import NotFound, NotReady
from mini_studio.records.routes import Route
from mini_studio.settings import Api

REFUSED_PAUSES_S = (0.1, 0.3, 0.6, 1.0)
KEPT_BYTES = 64 * 1024
"""How much of a waiting request's body is read. The rest stays with its client, whose hang-up then shows only later."""


class Holding:
    """The requests that wait: so many for each deployment at most, and each so long at most."""

    def __init__(self, routes: RouteTable, settings: Api) -> None:
        self._routes = routes
        self._settings = settings
        self._held: Counter[str] = Counter()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Hold nothing any more: the process ends."""
        self._leaving.set()

    async def awake(self, request: Request, route: Route) -> tuple[Request, Route]:
        """The request, untouched, and the route as it is by now, once the deployment is awake, or has failed.

        Raises `NotReady` when that takes too long or too many wait already, `NotFound` when it was removed meanwhile, and
        `ClientDisconnect` when the client hangs up.
        """
        route = self._routes.get(route.key) or route
        if not route.asleep:
            return request, route
        if self._held[route.key] >= self._settings.hold_requests:
            raise NotReady(
                f"deployment {route.name} sleeps, and {self._held[route.key]} requests wait for it; try again"
            )
        self._held[route.key] += 1
        try:
            return await self._wait(request, route)
        finally:
            self._held[route.key] -= 1
            if not self._held[route.key]:
                del self._held[route.key]

    async def _wait(self, request: Request, route: Route) -> tuple[Request, Route]:
        body = _Body(request.receive)
        waking = asyncio.create_task(self._routes.until(lambda: not self._sleeps(route)))
        ending = asyncio.create_task(self._leaving.wait())
        hung_up = asyncio.create_task(body.hung_up())
        tasks = (waking, ending, hung_up)
        try:
            await asyncio.wait(tasks, timeout=self._settings.hold_s, return_when=asyncio.FIRST_COMPLETED)
            if hung_up.done():
                await hung_up
                raise ClientDisconnect
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._sleeps(route):
            raise NotReady(f"deployment {route.name} slept and is not awake yet; try again shortly")
        awake = self._routes.get(route.key)
        if awake is None:
            raise NotFound(f"deployment {route.name} was removed")
        return Request(request.scope, body.receive), awake

    def _sleeps(self, route: Route) -> bool:
        """Whether it still has to wake. While it starts, it may have no endpoint either."""
        now = self._routes.get(route.key)
        if now is None or now.status is DeploymentStatus.FAILED:
            return False
        return now.asleep or not now.endpoints


class _Body:
    """A request's body that begins to be read before somebody wants it: only who reads hears that the client hangs up."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: deque[Message] = deque()

    async def receive(self) -> Message:
        return self._kept.popleft() if self._kept else await self._receive()

    async def hung_up(self) -> None:
        """Return when the client is gone."""
        size, more = 0, True
        while more and size < KEPT_BYTES:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return
            self._kept.append(message)
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        if more:
            await asyncio.get_running_loop().create_future()
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def ask(request: Request, route: Route, holding: Holding, client: httpx.AsyncClient) -> StreamingResponse:
    """Forward it, when the deployment is awake.

    A refused connection is tried again for a while, by the route as it is then: the last replica may just have gone, or the
    cluster may not know everywhere yet that the first one is there. The request stays whole, nothing of it was sent.
    """
    for pause_s in REFUSED_PAUSES_S:
        request, route = await holding.awake(request, route)
        try:
            return await proxy.forward(request, proxy.usable(route), client)
        except proxy.Refusing:
            await asyncio.sleep(pause_s)
    request, route = await holding.awake(request, route)
    return await proxy.forward(request, proxy.usable(route), client)
