"""Requests for a deployment that sleeps, or whose start is only just known, wait here: their number is what wakes it."""

import asyncio
from collections import Counter
from collections.abc import Callable

from events.types import DeploymentStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.errors import NotFound, NotReady
from mini_studio.records.routes import Route
from mini_studio.settings import Gateway

AGAIN_S = 2.5
"""How often a request that waits says so again: what it said before may be lost."""
STARTING_S = 1.0
"""How long one that starts is waited for: its record and its route follow the log each by itself, and one may be a moment behind."""


class Holding:
    """The requests that wait: so many for each deployment at most, and each so long at most."""

    def __init__(self, routes: RouteTable, settings: Gateway, wake: Callable[[Route], None] = lambda _: None) -> None:
        """`wake` is called for each request that waits, and again every few seconds."""
        self._wake = wake
        self._routes = routes
        self._settings = settings
        self._held: Counter[str] = Counter()
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Hold nothing any more: the process ends."""
        self._leaving.set()

    async def awake(self, route: Route) -> Route:
        """The route as it is by now, once the deployment is awake, or has failed.

        Raises `NotReady` when that takes too long or too many wait already, `NotFound` when it was removed meanwhile. Who hangs up
        meanwhile is not waited for any more: cancel this.
        """
        route = self._routes.get(route.key) or route
        if not waits(route):
            return route
        if self._held[route.key] >= self._settings.hold_requests:
            raise NotReady(
                f"deployment {route.name} sleeps, and {self._held[route.key]} requests wait for it; try again"
            )
        self._held[route.key] += 1
        try:
            await self._wait(route, self._settings.hold_s if route.asleep else STARTING_S)
        finally:
            self._held[route.key] -= 1
            if not self._held[route.key]:
                del self._held[route.key]
        return self._now(route)

    def _now(self, route: Route) -> Route:
        now = self._routes.get(route.key)
        if now is None:
            raise NotFound(f"deployment {route.name} was removed")
        if waits(now) and route.asleep:
            raise NotReady(f"deployment {route.name} slept and is not awake yet; try again shortly")
        return now

    async def _wait(self, route: Route, seconds: float) -> None:
        waking = asyncio.create_task(self._routes.until(lambda: not waits(self._routes.get(route.key))))
        ending = asyncio.create_task(self._leaving.wait())
        calling = asyncio.create_task(self._call(route))
        tasks = (waking, ending, calling)
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, route: Route) -> None:
        while True:
            now = self._routes.get(route.key) or route
            if now.asleep:
                self._wake(now)
            await asyncio.sleep(AGAIN_S)


def waits(route: Route | None) -> bool:
    """Whether it still has to wake, or to start. While it starts, it may have no endpoint either."""
    if route is None or route.status is DeploymentStatus.FAILED:
        return False
    return route.asleep or not route.endpoints
