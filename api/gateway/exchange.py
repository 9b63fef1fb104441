"""One request to a model, as both clients carry it out: who asks, for which deployment, at which replica, and what came of it."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import orjson
import structlog

from api.gateway.holding import Holding
from api.gateway.identity import Identity
from api.gateway.limits import UNLIMITED, Admission, Limits
from api.gateway.load import Load
from api.gateway.replicas import Replicas
from api.gateway.tokens import END_BYTES, reported
from api.gateway.usage import UsageLog, Used
from api.gateway.watch import now
from events.types import CLIENT_CODE_PATTERN, DeploymentStatus
from mini_studio.bus.routes import RouteTable
from mini_studio.errors import (
    DeploymentFailed,
    Invalid,
    ModelNotFound,
    NotFound,
    NotReady,
    StudioError,
    Upstream,
)
from mini_studio.records.routes import Route
from mini_studio.settings import Settings

log = structlog.get_logger(__name__)

REFUSED_PAUSES_S = (0.1, 0.3, 0.6, 1.0)
"""A refused connection is tried again for a while, by the route as it is then: the last replica may just have gone, or the cluster
may not know everywhere yet that the first one is there. The request stays whole, nothing of it was sent."""
RETRIED = (502, 503)
"""Answers of a model server, or of what stands before it, that another replica may not give."""
HUNG_UP = 499
KEPT_BYTES = 64 * 1024
"""How much of a body is kept, so that it can be sent again; more of a waiting request's stays with its client."""
BEGINNING_BYTES = 512
MOST_PARSED = 64 * 1024
LONGEST_NAME = 300
CACHED = 4096
_client_code = re.compile(CLIENT_CODE_PATTERN)


class Refusing(Upstream):
    """The model server takes no connection."""


class Exchanger:
    """What all requests of this process share."""

    def __init__(self, settings: Settings, routes: RouteTable, wake: Callable[[Route], None] = lambda _: None) -> None:
        """`wake` is called for requests that wait for a deployment that sleeps."""
        self.settings = settings.gateway
        self.max_body_bytes = settings.api.max_body_bytes
        self.routes = routes
        self.identity = Identity(settings)
        self.limits = Limits(settings.gateway)
        self.holding = Holding(routes, settings.gateway, wake)
        self.load = Load()
        self.replicas = Replicas(settings.gateway)
        self.usage = UsageLog(settings)
        self._found: dict[tuple[str | None, str], Route] = {}
        self._found_version = 0

    def open(self, request_id: str, client: str | None, model: str, *, openai: bool = False) -> "Exchange":
        """Begin one. Raises `NotFound`, `NotReady` while the routes are unknown, and `RateLimited`."""
        exchange = Exchange(self, request_id, client or "", self._route(client, model, openai))
        exchange.admit()
        return exchange

    def _route(self, client: str | None, model: str, openai: bool) -> Route:
        if self._found_version != self.routes.version or len(self._found) > CACHED:
            self._found.clear()
            self._found_version = self.routes.version
        route = self._found.get((client, model))
        if route is None:
            route = self._found[client, model] = self._look_up(client, model, openai)
        return route

    def _look_up(self, client: str | None, model: str, openai: bool) -> Route:
        if len(model) > LONGEST_NAME:
            raise Invalid(f"model_name: String should have at most {LONGEST_NAME} characters")
        route = self.routes.lookup(client, model)
        if route is not None:
            return route
        if not self.routes.loaded:
            raise NotReady("the routes are still being read; try again shortly")
        who = f"client {client!r}" if client else "callers that name no client"
        missing = ModelNotFound if openai else NotFound
        raise missing(f"no model {model[:200]!r} is deployed for {who}; see GET /inference/deployments")


def checked_client(named: str, field: str) -> str:
    """A client code as a caller gave it. Raises `Invalid`."""
    if not _client_code.fullmatch(named):
        text = f"{field}: String should match pattern '{CLIENT_CODE_PATTERN}'; got {named[:80]!r}"
        raise Invalid(text, details=[{"field": field, "message": text.partition(": ")[2]}])
    return named


def usable(route: Route) -> Route:
    """The same route, if something answers there."""
    if route.status is DeploymentStatus.FAILED:
        raise DeploymentFailed(f"deployment {route.name} failed: {route.message}")
    if not route.endpoints:
        raise NotReady(f"deployment {route.name} is not ready yet; try again shortly")
    return route


class Exchange:
    """One request that has a route. `end` is called once, whatever comes of it."""

    __slots__ = (
        "_admission",
        "_but",
        "_end_bytes",
        "_ended",
        "_exchanger",
        "_first_byte",
        "_moved",
        "_pauses",
        "beginning",
        "client",
        "endpoint",
        "request_id",
        "route",
        "started",
    )

    def __init__(self, exchanger: Exchanger, request_id: str, client: str, route: Route) -> None:
        self._exchanger = exchanger
        self.request_id = request_id
        self.client = client
        self.route = route
        self.started = now()
        self.endpoint: str | None = None
        """The replica that has it now."""
        self.beginning: bytes | None = None
        self._admission: Admission | None = None
        self._first_byte: float | None = None
        self._end_bytes = b""
        self._but: str | None = None
        self._moved = False
        self._pauses = 0
        self._ended = False

    def admit(self) -> None:
        try:
            self._admission = self._exchanger.limits.admit(self.client)
        except StudioError as error:
            self.end(error.status)
            raise
        self._exchanger.load.enter(self.route.name)

    @property
    def limits(self) -> Admission:
        """Where its client stands, for the answer's headers."""
        return self._admission or UNLIMITED

    def ready(self) -> bool:
        """Whether it can be sent at once: nothing has to wake, to start, or to be tried again."""
        route = self.route
        return bool(route.endpoints) and route.replicas > 0 and route.status is not DeploymentStatus.FAILED

    def take(self, body: bytes | bytearray | None) -> str | None:
        """The replica for it; `body` as far as it is there, for a choice among several."""
        route = self.route
        if body is not None and len(route.endpoints) > 1 and self.beginning is None:
            self.beginning = beginning(body)
        self.endpoint = self._exchanger.replicas.take(route, self.beginning, self._but)
        return self.endpoint

    async def placed(self, body: bytes | bytearray | None) -> str:
        """The replica for it, when the deployment is awake. Raises what `Holding.awake` raises, and `DeploymentFailed`."""
        if self.endpoint is not None:
            return self.endpoint
        self.route = usable(await self._exchanger.holding.awake(self.route))
        endpoint = self.take(body)
        if endpoint is None and self._but is not None:
            self._but = None
            endpoint = self.take(body)
        if endpoint is None:
            raise NotReady(f"no replica of deployment {self.route.name} takes requests just now; try again shortly")
        return endpoint

    async def refused(self, error: object) -> None:
        """The replica took no connection: return when another try makes sense. Raises `Refusing`."""
        endpoint = self.endpoint
        self.release(failed=True)
        if not self._moved and len(self.route.endpoints) > 1:
            self._moved, self._but = True, endpoint
            return
        self._but = None
        if self._pauses == len(REFUSED_PAUSES_S):
            raise Refusing(f"deployment {self.route.name} cannot be reached: {error or type(error).__name__}")
        self._pauses += 1
        await asyncio.sleep(REFUSED_PAUSES_S[self._pauses - 1])

    def moves(self) -> bool:
        """Whether another replica has it now, after this one answered 502 or 503: at most once."""
        if self._moved or len(self.route.endpoints) < 2:
            return False
        failing = self.endpoint
        other = self._exchanger.replicas.take(self.route, self.beginning, failing)
        if other is None:
            return False
        self.release(failed=True)
        self._moved, self.endpoint = True, other
        return True

    def release(self, *, failed: bool | None) -> None:
        """The replica has it no more. `failed` None: nobody knows."""
        endpoint, self.endpoint = self.endpoint, None
        if endpoint is not None:
            self._exchanger.replicas.done(endpoint, failed=failed)

    def began(self) -> None:
        """The answer's first byte is there."""
        self._first_byte = now()

    def passed(self, data: bytes) -> None:
        """Look at what passes by, for the token counts at its end."""
        if self._end_bytes:
            data = self._end_bytes + data
        self._end_bytes = data if len(data) <= END_BYTES else data[-END_BYTES:]

    def end(self, status: int, *, failed: bool = False, reason: object = None) -> None:
        """It is over: `status` is what the client got. `failed`: by the replica's fault."""
        if self._ended:
            return
        self._ended = True
        # Who hung up before anything was answered says nothing of the replica.
        self.release(failed=failed if failed or self._first_byte is not None else None)
        exchanger, ended, route = self._exchanger, now(), self.route
        prompt, completion = reported(self._end_bytes) if self._end_bytes else (None, None)
        admission = self._admission
        if admission is not None:
            admission.left(None if prompt is None and completion is None else (prompt or 0) + (completion or 0))
            exchanger.load.leave(route.name)
        exchanger.load.answered(route.name, status, ended - self.started)
        first_byte = self._first_byte
        exchanger.usage.add(
            Used(
                self.client,
                route.model,
                route.deployment_id,
                route.revision,
                prompt,
                completion,
                status,
                None if first_byte is None else (first_byte - self.started) * 1000,
                (ended - self.started) * 1000,
            )
        )
        if status >= 500 or status == HUNG_UP or reason is not None:
            log.warning(
                "exchange.failed",
                request_id=self.request_id,
                deployment=route.name,
                status=status,
                reason=None if reason is None else str(reason)[:300],
            )


def beginning(body: bytes | bytearray) -> bytes | None:
    """The first part of the prompt, or of the chat, if the whole body is there and not large."""
    if len(body) > MOST_PARSED:
        return None
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(data, dict):
        return None
    found = data.get("messages") or data.get("prompt") or data.get("input")
    if isinstance(found, str):
        return found[:BEGINNING_BYTES].encode(errors="replace")[:BEGINNING_BYTES]
    try:
        return orjson.dumps(found)[:BEGINNING_BYTES] if found else None
    except orjson.JSONEncodeError:  # it is nested more deeply than can be written
        return None
