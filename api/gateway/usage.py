"""What every request used, for topic `mini-studio.usage`: never a prompt, never an answer."""

import asyncio
import contextlib
import random
from typing import Any, NamedTuple

import structlog
from prometheus_client import Counter

from mini_studio.bus.kafka import Outgoing
from mini_studio.bus.usage import UsageFeed
from mini_studio.settings import Settings

log = structlog.get_logger(__name__)

MOST = 50_000
"""Records that wait at most, some 20 MB of them."""
BATCH = 500
EVERY_S = 1.0
"""How long a record waits for others; fewer come of their own accord when a batch is full."""
AWAY_S = 10.0
"""How long a batch is tried while the broker is away. Then it is dropped with all that waits behind it, which is nearly as old."""
LAST_S = 2.0
"""What publishing the last ones may take when the process ends."""

PUBLISHED = Counter("mini_studio_usage_records", "Usage records that the broker has.")
DROPPED = Counter(
    "mini_studio_usage_dropped", "Usage records that were given up: too many waited, or the broker was away."
)


class Used(NamedTuple):
    """One request that went to a model, or would have."""

    client_code: str
    """Who asked; empty for who named no client."""
    model: str
    deployment_id: str
    revision: int
    prompt_tokens: int | None
    """As the model server reported it; None where it did not."""
    completion_tokens: int | None
    status: int
    """HTTP status that the client got; 499 when it hung up before it had one."""
    first_byte_ms: float | None
    """From the request's arrival to the first byte of the answer."""
    total_ms: float


class UsageLog:
    """Takes records on the hot path, in nanoseconds, and publishes them in batches off it: at most once, none is worth waiting for."""

    def __init__(self, settings: Settings) -> None:
        self._sample = settings.gateway.usage_sample
        self._weight = 1 / self._sample if self._sample else 0.0
        self._feed = UsageFeed(settings.kafka)
        self._waiting: list[Used] = []
        self._overflowed = 0
        self._enough = asyncio.Event()
        """Set when a batch is full."""
        self._in_hand: tuple[Outgoing, int] | None = None
        """The batch that is being published, with how many records it has."""

    def add(self, used: Used) -> None:
        """Keep it for the next batch. Never blocks, never raises; when too many wait, it is dropped and counted."""
        if self._sample < 1.0 and random.random() >= self._sample:
            return
        waiting = self._waiting
        if len(waiting) >= MOST:
            self._overflowed += 1
            return
        waiting.append(used)
        if len(waiting) == BATCH:
            self._enough.set()

    async def run(self) -> None:
        """Publish until cancelled. An idle gateway publishes nothing."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._enough.wait()
            try:
                await self._publish_down_to(BATCH - 1, AWAY_S)
            except Exception:
                # Nobody watches this task: whatever went wrong, it says so and goes on.
                log.exception("usage.failed")
                self._give_up()

    async def aclose(self) -> None:
        """Publish what waits, once `run` has ended, within `LAST_S`; what cannot be is dropped."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_S):
                await self._publish_down_to(0, LAST_S)
                await self._feed.aclose()
        self._give_up()

    async def _publish_down_to(self, left: int, away_s: float) -> None:
        """Publish what waits, a batch at a time, until no more than `left` wait on; the loop's other work comes in between."""
        while await self._publish_one(away_s) and len(self._waiting) > left:
            pass
        self._enough.clear()

    async def _publish_one(self, away_s: float) -> bool:
        """Publish a batch, if there is one; False when the broker does not take it, and all is dropped."""
        if self._in_hand is None and self._waiting:
            part = self._waiting[:BATCH]
            self._in_hand = self._feed.batch([self._record(used) for used in part]), len(part)
            self._waiting = self._waiting[BATCH:]
        if self._in_hand is None:
            return True
        batch, count = self._in_hand
        if not await self._feed.publish(batch, away_s):
            self._give_up()
            return False
        self._in_hand = None
        PUBLISHED.inc(count)
        self._count_overflow()
        return True

    def _give_up(self) -> None:
        """Drop all there is."""
        count = len(self._waiting) + (self._in_hand[1] if self._in_hand else 0)
        self._waiting, self._in_hand = [], None
        self._count_overflow(count)
        if count:
            log.warning("usage.dropped", records=count)

    def _count_overflow(self, more: int = 0) -> None:
        DROPPED.inc(self._overflowed + more)
        self._overflowed = 0

    def _record(self, used: Used) -> dict[str, Any]:
        """As the topic has it. A name that led to no deployment is the caller's own text, and stays here."""
        client, model, deployment, revision, prompt, completion, status, first_byte_ms, total_ms = used
        record: dict[str, Any] = {"status": status, "total_ms": int(total_ms * 1000) / 1000}
        if client:
            record["client_code"] = client
        if deployment:
            record["model"], record["deployment_id"], record["revision"] = model, deployment, revision
        if prompt is not None:
            record["prompt_tokens"] = prompt
        if completion is not None:
            record["completion_tokens"] = completion
        if first_byte_ms is not None:
            record["first_byte_ms"] = int(first_byte_ms * 1000) / 1000
        if self._weight > 1.0:
            record["weight"] = self._weight
        return record
