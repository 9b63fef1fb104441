"""A consumer: a FastStream app with its own group, whose handlers are registered per event type.

training = Consumer("training")

@training.on(FineTuneRequested)
async def claim(envelope: Envelope[FineTuneRequested], studio: Studio) -> None: ...
"""

import asyncio
import functools
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from itertools import chain
from typing import Any, TypeVar, cast

import prometheus_client
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener
from faststream import AckPolicy, FastStream
from faststream.kafka import KafkaBroker, KafkaMessage
from faststream.security import BaseSecurity, SASLPlaintext, SASLScram256, SASLScram512

from events.base import Envelope, Event
from events.registry import BY_TYPE
from events.topics import Plain, Topic
from mini_studio.bus.connection import security_options, unavailable
from mini_studio.bus.delivery import Delivery, bound, no_decoding, parse, redriven_for, text_headers
from mini_studio.bus.kafka import READERS, Publisher
from mini_studio.bus.metrics import EVENTS_IN, HANDLER_SECONDS
from mini_studio.bus.provenance import Journal, event_of
from mini_studio.errors import StudioError
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)

H = TypeVar("H", bound=Callable[[Envelope[Any], Any], Coroutine[Any, Any, None]])
Handler = Callable[[Envelope[Any], Any], Coroutine[Any, Any, None]]
Projector = Callable[[list[Envelope[Any]], Any], Coroutine[Any, Any, None]]
Service = Callable[[Any], Coroutine[Any, Any, None]]
Told = Sequence[tuple[Any, dict[str, str]]]
"""The records of a batch, each with its text headers."""

MECHANISMS = {"PLAIN": SASLPlaintext, "SCRAM-SHA-256": SASLScram256, "SCRAM-SHA-512": SASLScram512}

LONGEST_BATCH_S = 300.0
"""A batch that takes longer loses its partitions to another member, and would go round for ever."""

WAIT_MS = 1000
"""How long a consumer waits for news at a time; they end the wait."""


class Handover(ConsumerRebalanceListener):  # type: ignore[misc]
    """Before its partitions are given up, lets the batch in hand be finished and committed: no other member takes it again."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.subscriber: Any = None

    async def on_partitions_revoked(self, revoked: Any) -> None:
        # FastStream holds the lock of a batch until its offsets are committed.
        await self.subscriber.lock.wait_release(self._limit_s)

    async def on_partitions_assigned(self, assigned: Any) -> None:
        pass


class Consumer:
    """Declares what one consumer does; `broker` binds it to a studio. Declaring connects to nothing."""

    def __init__(
        self,
        name: str,
        group: str | None = None,
        max_records: int = 500,
        longest_s: float = LONGEST_BATCH_S,
        *,
        routes: bool = False,
    ) -> None:
        self.name = name
        self.routes = routes
        """Whether routes come from it, so that it waits for news as the gateways do."""
        self.max_records = max_records
        self.longest_s = longest_s
        self.group = group or f"mini-studio.{name}"
        self.topics: tuple[Topic | Plain, ...] = READERS[name]
        self.handlers: dict[type[Event], Handler] = {}
        self.services: list[Service] = []
        self._projector: Projector | None = None
        self.busy, self.touched_at = False, time.monotonic()
        """Whether a batch is in hand, and when the last one was begun or finished (monotonic)."""

    def on(self, *types: type[Event]) -> Callable[[H], H]:
        """Register the handler of one or more event types. Other known types are none of this consumer's business."""

        def register(handler: H) -> H:
            for event_type in types:
                if event_type.TOPIC not in self.topics or event_type in self.handlers or self._projector:
                    raise ValueError(f"{self.name} cannot take {event_type.__name__} here")
                self.handlers[event_type] = handler
            return handler

        return register

    def projects(self, *types: type[Event]) -> Callable[[Projector], Projector]:
        """Register the one handler of all that the consumer takes, whole batches of it, in order; it is a no-op on what it had before."""

        def register(project: Projector) -> Projector:
            if self.handlers:
                raise ValueError(f"{self.name} has other handlers, which would not see what is in a batch")

            async def one(envelope: Envelope[Any], studio: Any) -> None:
                await project([envelope], studio)

            self.on(*types)(one)
            self._projector = project
            return project

        return register

    def service(self, run: Service) -> Service:
        """Register a task that runs beside the handlers: a reconciler or a watcher."""
        self.services.append(run)
        return run

    def broker(self, settings: Kafka, publisher: Publisher, studio: Any) -> KafkaBroker:
        """The FastStream broker with one subscriber per topic."""
        broker = KafkaBroker(
            settings.bootstrap,
            security=security_of(settings),
            client_id=f"mini-studio-{self.name}",
            acks="all",
            allow_auto_create_topics=False,
            graceful_timeout=10.0,
            logger=None,
        )
        for topic in self.topics:
            # In a rebalance the broker waits for each member as long as for a silent one, and tells it with its next heartbeat.
            handover = Handover(0.7 * settings.session_timeout_ms / 1000)
            handover.subscriber = subscriber = broker.subscriber(
                topic.value,
                group_id=self.group,
                batch=True,
                auto_offset_reset="earliest",
                ack_policy=AckPolicy.NACK_ON_ERROR,
                session_timeout_ms=settings.session_timeout_ms,
                heartbeat_interval_ms=settings.session_timeout_ms // 10,
                max_poll_interval_ms=int(self.longest_s * 1000),
                listener=handover,
                fetch_max_wait_ms=settings.routes_wait_ms if self.routes else settings.fetch_wait_ms,
                parser=parse,
                decoder=no_decoding,
            )
            subscriber.get_msg = functools.partial(news, self.max_records)  # type: ignore[method-assign]
            subscriber(self._handler(Delivery(self.name, publisher), studio))
        return broker

    def _handler(self, delivery: Delivery, studio: Any) -> Callable[[KafkaMessage], Awaitable[None]]:
        async def handle(message: KafkaMessage) -> None:
            records = cast("tuple[Any, ...]", message.raw_message)
            self.busy, self.touched_at = True, time.monotonic()
            try:
                if logging.getLogger().isEnabledFor(logging.DEBUG):
                    for record in records:
                        at = f"{record.topic}/{record.partition}@{record.offset}"
                        log.debug("consumer.received", consumer=self.name, place=at)
                await self.take(records, delivery, studio)
                delivery.forget(records)
            finally:
                self.busy, self.touched_at = False, time.monotonic()

        return handle

    async def take(self, records: tuple[Any, ...], delivery: Delivery, studio: Any) -> None:
        """Have the records handled, put aside, or (by `NackMessage`) put off."""
        every = ((record, text_headers(record)) for record in records)
        told = [(record, headers) for record, headers in every if self.wants(record, headers)]
        journal = await self._journal(told, delivery, studio)

        async def one(record: Any, headers: dict[str, str]) -> None:
            await self.deliver(event_of(record, headers, journal), studio)

        if not await self._project(told, journal, delivery, studio):
            with bound():
                for record, headers in told:
                    await delivery.deliver(record, headers, one)

    def wants(self, record: Any, headers: dict[str, str]) -> bool:
        """False for what is none of this consumer's business: another one's redrive, or a known type. It need not even be decoded."""
        if redriven_for(record) not in (None, self.name):
            return False
        event_type = BY_TYPE.get(headers.get("ce_type", ""))
        return event_type is None or event_type in self.handlers or record.topic != event_type.TOPIC

    async def _journal(self, told: Told, delivery: Delivery, studio: Any) -> Journal:
        """What the journal has of the batch, in one read. While it cannot be read, the whole batch is put off."""
        ids = [headers["ce_id"] for _, headers in told if "ce_id" in headers]
        try:
            journal: Journal = await studio.store.journalled(ids)
        except Exception as error:
            await delivery.put_off(delivery.count_failure(told[0][0]), f"the journal cannot be read: {error!r}")
        return journal

    async def _project(self, told: Told, journal: Journal, delivery: Delivery, studio: Any) -> bool:
        """Take the whole batch at once; False when something in it is wrong, so that each record gets its own verdict.

        What is only away for now is away for each of them: then the whole batch is put off.
        """
        if self._projector is None or len(told) < 2:
            return False
        try:
            envelopes = [event_of(record, headers, journal) for record, headers in told]
            await self._projector(envelopes, studio)
        except Exception as error:
            if isinstance(error, StudioError) and error.retryable:
                await delivery.put_off(delivery.count_failure(told[0][0]), error.message)
            log.info("consumer.batch_taken_apart", consumer=self.name, records=len(told), reason=repr(error))
            return False
        for (topic, type_), count in Counter((e.topic, e.type) for e in envelopes).items():
            EVENTS_IN.labels(self.name, topic, type_).inc(count)
        return True

    async def deliver(self, envelope: Envelope[Any], studio: Any) -> None:
        """Hand one event to its handler, if there is one."""
        handler = self.handlers.get(type(envelope.data))
        if handler is None:
            return
        seconds, handled = meters(self.name, envelope.topic, envelope.type)
        began = time.perf_counter()
        try:
            await handler(envelope, studio)
        finally:
            seconds.observe(time.perf_counter() - began)
        handled.inc()

    def app(self, broker: KafkaBroker) -> FastStream:
        return FastStream(broker, logger=None)


async def news(max_records: int, client: AIOKafkaConsumer) -> tuple[Any, ...]:
    """The next batch. FastStream's own `get_msg` looks away for as long as it waited in vain: news would lie for a second."""
    while not (found := await client.getmany(timeout_ms=WAIT_MS, max_records=max_records)):
        pass
    return tuple(chain(*found.values()))


@functools.cache
def meters(consumer: str, topic: str, type_: str) -> tuple[prometheus_client.Histogram, prometheus_client.Counter]:
    """Looking a labelled metric up takes longer than to count with it."""
    return HANDLER_SECONDS.labels(consumer, type_), EVENTS_IN.labels(consumer, topic, type_)


def security_of(settings: Kafka) -> BaseSecurity:
    """The options of all clients, in FastStream's words."""
    options = security_options(settings)
    context, user = options.get("ssl_context"), options.get("sasl_plain_username")
    if user is None:
        return BaseSecurity(ssl_context=context)
    return MECHANISMS[settings.sasl_mechanism](user, options["sasl_plain_password"], ssl_context=context)


async def start_broker(broker: KafkaBroker, settings: Kafka, retry_s: float = 1.0) -> None:
    """Connect and start all subscribers together, however long the broker is away."""
    while True:
        try:
            await broker.connect()
            # Not broker.start(): it starts one after another, and a slow group join would add up.
            await asyncio.gather(*(subscriber.start() for subscriber in broker.subscribers))
        except Exception as error:
            log.warning("consumer.waiting_for_broker", reason=(await unavailable(settings, error)).message)
            await asyncio.gather(*(subscriber.stop() for subscriber in broker.subscribers), return_exceptions=True)
            await asyncio.sleep(retry_s)
        else:
            broker.running = True
            return
