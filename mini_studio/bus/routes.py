"""The gateways' routes: a table in memory, and the feed that follows `mini-studio.routes` by assignment (no group: a broadcast)."""

import asyncio
import contextlib
from collections.abc import Callable

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from events.topics import ROUTES
from events.types import DeploymentKind, DeploymentStatus
from mini_studio.bus.kafka import quietly
from mini_studio.records.routes import Route
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)


class RouteTable:
    """Which model server answers for whom. Look-ups are dictionary reads."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._named: dict[tuple[str, str], list[Route]] = {}
        self.loaded = False
        """Whether the feed has read the log to its end once."""

    def put(self, key: str, route: Route | None) -> None:
        """Set or remove one route; an older revision than the present one changes nothing."""
        present = self._routes.get(key)
        if route is not None and present is not None and route.revision < present.revision:
            return
        if present is not None:
            for name in self._names(present):
                self._named[name].remove(present)
            del self._routes[key]
        if route is not None:
            self._routes[key] = route
            for name in self._names(route):
                self._named.setdefault(name, []).append(route)

    def lookup(self, client_code: str | None, model: str) -> Route | None:
        """The client's own fine-tuned model first (by its name, else the latest of that base), then bases."""
        own = self._named.get((client_code, model), []) if client_code else []
        shared = self._named.get(("", model), [])
        return max([*own, *shared], key=lambda route: self._preference(route, model), default=None)

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

    async def run(self) -> None:
        """Follow the topic until cancelled, from its beginning, and again whenever the broker was replaced."""
        while True:
            try:
                await self._follow(self._epoch())
            except (KafkaError, OSError, TimeoutError) as error:
                log.warning("route_feed.waiting", reason=repr(error))
                await asyncio.sleep(1)

    async def _follow(self, epoch: object) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._settings.bootstrap,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=self._settings.fetch_wait_ms,
        )
        try:
            await asyncio.wait_for(consumer.start(), 10)
            partitions = [TopicPartition(ROUTES, p) for p in sorted(consumer.partitions_for_topic(ROUTES) or {0})]
            consumer.assign(partitions)
            while self._epoch() == epoch:
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    for record in records:
                        self._apply(record.key, record.value)
                self._table.loaded = self._table.loaded or await _at_end(consumer, partitions)
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(quietly(consumer.stop()), 5)

    def _apply(self, key: bytes, value: bytes | None) -> None:
        try:
            self._table.put(key.decode(), Route.model_validate_json(value) if value else None)
        except (ValidationError, UnicodeDecodeError, AttributeError) as error:
            log.error("route_feed.ignored", key=repr(key), reason=str(error))


async def _at_end(consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> bool:
    for partition in partitions:
        highwater = consumer.highwater(partition)
        if highwater is not None and await consumer.position(partition) < highwater:
            return False
    return True
