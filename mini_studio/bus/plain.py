"""A consumer of a topic that holds no events: its records are not in the journal, so nothing tells where they came from.

usage = PlainConsumer("usage", UsageBatch.read)

@usage.takes
async def sum_up(batches: list[UsageBatch], studio: Studio) -> None: ...
"""

import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

import structlog

from mini_studio.bus.consumer import Consumer, meters
from mini_studio.bus.delivery import Delivery, bound, redriven_for, text_headers
from mini_studio.errors import StudioError

log = structlog.get_logger(__name__)

M = TypeVar("M")


class PlainConsumer(Consumer, Generic[M]):
    """Declares one: `read` makes a message of a record's value, or raises `UndecodableEvent`, which puts the record aside."""

    def __init__(self, name: str, read: Callable[[bytes | None], M], max_records: int = 500) -> None:
        super().__init__(name, max_records=max_records)
        self._read = read
        self._take: Callable[[list[M], Any], Coroutine[Any, Any, None]] | None = None

    def takes(
        self, take: Callable[[list[M], Any], Coroutine[Any, Any, None]]
    ) -> Callable[[list[M], Any], Coroutine[Any, Any, None]]:
        """Register the one handler: whole batches, in order; it is a no-op on what it had before."""
        self._take = take
        return take

    async def take(self, records: tuple[Any, ...], delivery: Delivery, studio: Any) -> None:
        mine = [record for record in records if redriven_for(record) in (None, self.name)]

        async def one(record: Any, headers: dict[str, str]) -> None:
            await self._handle([record], studio)

        if not await self._all(mine, delivery, studio):
            with bound():
                for record in mine:
                    await delivery.deliver(record, text_headers(record), one)

    async def _all(self, records: list[Any], delivery: Delivery, studio: Any) -> bool:
        """Take the whole batch at once; False when something in it is wrong, so that each record gets its own verdict."""
        if len(records) < 2:
            return False
        try:
            await self._handle(records, studio)
        except Exception as error:
            if isinstance(error, StudioError) and error.retryable:
                await delivery.put_off(delivery.count_failure(records[0]), error.message)
            log.info("consumer.batch_taken_apart", consumer=self.name, records=len(records), reason=repr(error))
            return False
        return True

    async def _handle(self, records: list[Any], studio: Any) -> None:
        assert self._take is not None, f"{self.name} takes nothing"  # noqa: S101
        messages = [self._read(record.value) for record in records]
        seconds, handled = meters(self.name, self.topics[0].value, "plain")
        began = time.perf_counter()
        try:
            await self._take(messages, studio)
        finally:
            seconds.observe(time.perf_counter() - began)
        handled.inc(len(records))
