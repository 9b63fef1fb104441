"""The gateways' routes: a table in memory, and the feed that follows `mini-studio.routes` by assignment (no group: a broadcast)."""

import asyncio
import time
from collections.abc import Callable, Sequence

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from events.topics import ROUTES
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.connection import unavailable
from mini_studio.bus.reading import at_end, following
from mini_studio.records.routes import Route
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)

SILENT_S = 0.7
"""How much later than it should an answer of the broker may come before that counts as a problem; it may pass by itself."""
REPLACED_AFTER_S = 5.0
"""How much later before the client is replaced: on a half-open connection it would wait 40 s."""
LOOK_EVERY_S = 0.02


class RouteTable:
    """Which model server answers for whom. Look-ups are dictionary reads."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._named: dict[tuple[str, str], list[Route]] = {}
        self._revisions: dict[str, int] = {}
        """Revision last applied per key. Tombstones count: without them a late duplicate would bring a route back."""
        self._changed = asyncio.Event()
        self.version = 0
        """Grows with every change, for whoever keeps what it looked up."""
        self.loaded = False
        """Whether the feed has read the log to its end once."""

    def put(self, key: str, route: Route | None, revision: int) -> None:
        """Set or remove one route; a revision that is not newer than the last one changes nothing."""
        if revision <= self._revisions.get(key, 0):
            return
        self._revisions[key] = revision
        present = self._routes.pop(key, None)
        if present is not None:
            for name in self._names(present):
                self._named[name].remove(present)
        if route is not None:
            self._routes[key] = route
            for name in self._names(route):
                self._named.setdefault(name, []).append(route)
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, reached: Callable[[], bool]) -> None:
        """Return when the table has come so far. Each change wakes who waits."""
        while not reached():
            await self._changed.wait()

    async def changed(self, since: int) -> int:
        """Return the version, once it is not `since`."""
        await self.until(lambda: self.version != since)
        return self.version

    def lookup(self, client_code: str | None, model: str) -> Route | None:
        """The client's own fine-tuned model first (by its name, else the latest of that base), then bases."""
        own = self._named.get((client_code, model), []) if client_code else []
        shared = self._named.get(("", model), [])
        return max([*own, *shared], key=lambda route: self._preference(route, model), default=None)

    def get(self, key: str) -> Route | None:
        return self._routes.get(key)

    def knows(self, key: str) -> bool:
        """Whether the route was ever read, be it that it is gone."""
        return key in self._revisions

    def all(self) -> list[Route]:
        return list(self._routes.values())

    @staticmethod
    def _names(route: Route) -> set[tuple[str, str]]:
        return {(route.client_code, route.model), (route.client_code, route.base_model)}

    @staticmethod
    def _preference(route: Route, model: str) -> tuple[bool, bool, bool, bool, str]:
        exact = route.model == model and route.kind is DeploymentKind.FINE_TUNED
        usable = route.status is not DeploymentStatus.FAILED
        fine_tuned = route.kind is DeploymentKind.FINE_TUNED
        ready = route.status is DeploymentStatus.READY
        return exact, usable and fine_tuned, bool(route.client_code), ready, route.requested_at


class RouteFeed:
    """Keeps a `RouteTable` up to date with the log."""

    def __init__(self, settings: Kafka, table: RouteTable, epoch: Callable[[], object]) -> None:
        self._settings = settings
        self._table = table
        self._epoch = epoch
        self.problem: str | None = None
        """Why the log cannot be followed at the moment; None when all is well."""

    async def read_until(self, reached: Callable[[RouteTable], bool], limit_s: float) -> None:
        """Return when the table has come so far, when the log cannot be followed now, or after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while not (reached(self._table) or self.problem) and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_EVERY_S)

    async def run(self) -> None:
        """Follow the topic until cancelled, from its beginning, and again whenever the broker was replaced."""
        while True:
            try:
                await self._follow(self._epoch())
            except (KafkaError, OSError, TimeoutError) as error:
                reason = (await unavailable(self._settings, error)).message
                problem = f"the routes cannot be followed: {reason}"
                if problem != self.problem:
                    log.warning("route_feed.waiting", reason=reason)
                self.problem = problem
                await asyncio.sleep(1)
            except Exception as error:
                # Nobody watches this task: whatever went wrong, it says so and goes on.
                log.exception("route_feed.failed")
                self.problem = f"following the routes failed unexpectedly: {error!r}"
                await asyncio.sleep(1)

    async def _follow(self, epoch: object) -> None:
        wait_ms = self._settings.routes_wait_ms
        async with following(self._settings, ROUTES, since="earliest", fetch_wait_ms=wait_ms) as (consumer, partitions):
            began = time.time()
            while self._epoch() == epoch:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        self._apply(record.key, record.value, dict(record.headers))
                self._table.loaded = self._table.loaded or await at_end(consumer, partitions)
                self._listen(time.time() - _last_answer(consumer, partitions, began))

    def _listen(self, silent_s: float) -> None:
        """Take note of how long the broker has said nothing; an idle one answers every fetch when its wait is over."""
        overdue_s = silent_s - self._settings.routes_wait_ms / 1000
        if overdue_s > REPLACED_AFTER_S:
            raise TimeoutError(f"the broker has not answered for {silent_s:.0f} s")
        silent = f"the routes cannot be followed: the broker has not answered for {silent_s:.1f} s"
        self.problem = silent if overdue_s > SILENT_S else None

    def _apply(self, key: bytes, value: bytes | None, headers: dict[str, bytes]) -> None:
        try:
            route = Route.model_validate_json(value) if value else None
            self._table.put(key.decode(), route, revision_in(headers))
        except (ValueError, AttributeError) as error:
            log.error("route_feed.ignored", key=repr(key), reason=str(error))


def revision_in(headers: dict[str, bytes]) -> int:
    """A tombstone has no value to say its revision: every record's `ce_id`, `<deployment>/<revision>`, does."""
    return int(headers.get("ce_id", b"").rpartition(b"/")[2])


def _last_answer(consumer: AIOKafkaConsumer, partitions: Sequence[TopicPartition], began: float) -> float:
    """Unix seconds of the last fetch that the broker answered; `began` before the first one."""
    answers: list[int | None] = [consumer.last_poll_timestamp(partition) for partition in partitions]
    return max([began, *(milliseconds / 1000 for milliseconds in answers if milliseconds)])
