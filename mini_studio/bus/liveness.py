"""Whether a consumer still does its work, and how far it is behind: a ping sees only the admin client, a dead consumer still pings.

A consumer is lost when it does not reach its group's coordinator or its partitions' leaders, handles nothing in spite of lag, or is
assigned nothing though the group has partitions to spare, while a fresh client does reach the broker. Then its process is to be started
again. Where a fresh client does not reach it either, the broker is away: a new process would not help, so it waits.
"""

import asyncio
import time
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from faststream.kafka import KafkaBroker

from mini_studio.bus.connection import client_options
from mini_studio.bus.consumer import Consumer
from mini_studio.bus.kafka import let_go
from mini_studio.bus.metrics import LAG
from mini_studio.settings import Kafka

log = structlog.get_logger(__name__)

EVERY_S, ANSWER_S = 5.0, 5.0
STILL_AFTER_S = 10.0
"""Lag and no batch in hand for this long: something is wrong. More than a join and a first fetch take."""
LOST_AFTER_S = 15.0
"""How long something has to be wrong, with the broker within reach, beyond a session: aiokafka heals most by itself, and a rebalance, in
which the coordinator answers nothing else on its connection, lasts as long as a session."""


class Liveness:
    """Looks at one consumer every few seconds."""

    def __init__(self, consumer: Consumer, broker: KafkaBroker, settings: Kafka) -> None:
        self._consumer = consumer
        self._broker = broker
        self._settings = settings
        self._problem: str | None = None
        self._wrong_since: float | None = None
        self._behind_since: float | None = None
        self._measured: set[TopicPartition] = set()

    def problem(self) -> str | None:
        """Why the consumer does not look well; None when it does."""
        return self._problem

    def lost(self) -> str | None:
        """Why the process has to be started again; None when it has not."""
        if self._wrong_since is None:
            return None
        lasted = time.monotonic() - self._wrong_since
        allowed = LOST_AFTER_S + self._settings.session_timeout_ms / 1000
        return f"{self._problem} for {lasted:.0f} s" if lasted > allowed else None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Look once."""
        wrong = self._stopped() or await self._out_of_reach() or await self._overdue() or await self._left_out()
        if wrong is None:
            self._problem = self._wrong_since = None
        elif await within_reach(self._settings, self._consumer):
            self._note(wrong)
            self._wrong_since = self._wrong_since or time.monotonic()
        else:
            self._note(f"{wrong}; the broker is away")
            self._wrong_since = None

    def _note(self, problem: str) -> None:
        if self._problem is None:
            log.warning("consumer.not_well", consumer=self._consumer.name, reason=problem)
        self._problem = problem

    def _stopped(self) -> str | None:
        ended = [s for s in self._broker.subscribers if all(task.done() for task in getattr(s, "tasks", ()))]
        return "takes no records any more" if ended else None

    async def _out_of_reach(self) -> str | None:
        """Ask what needs the group's coordinator and the leaders; measure the lag by the way."""
        self._forget({partition for client in self._clients() for partition in client.assignment()})
        try:
            async with asyncio.timeout(ANSWER_S):
                lag = sum([await self._lag(client) for client in self._clients()])
        except Exception as error:
            return f"does not reach its coordinator or its partitions' leaders ({error!r})"
        self._behind_since = (self._behind_since or time.monotonic()) if lag else None
        return None

    def _forget(self, assigned: set[TopicPartition]) -> None:
        """The lag of a partition that was given up is another member's to tell."""
        for partition in self._measured - assigned:
            LAG.remove(self._consumer.name, partition.topic, partition.partition)
        self._measured &= assigned

    async def _lag(self, client: AIOKafkaConsumer) -> int:
        total = 0
        assigned = client.assignment()
        ends = await _reach(client, assigned or self._first_partitions())
        for partition in assigned:
            # The embedded broker counts the last batch as one record; a fetch knows better, but may be an old one.
            end = max(ends[partition], client.highwater(partition) or 0)
            lag = max(0, end - await client.position(partition))
            LAG.labels(self._consumer.name, partition.topic, partition.partition).set(lag)
            self._measured.add(partition)
            total += lag
        return total

    async def _overdue(self) -> str | None:
        """A handler may take as long as it keeps its partitions; between two batches there is nothing to wait for."""
        untouched = time.monotonic() - self._consumer.touched_at
        if self._consumer.busy:
            return "is in one batch" if untouched > self._consumer.longest_s else None
        if self._behind_since is None:
            return None
        waiting = min(untouched, time.monotonic() - self._behind_since)
        return "is behind and handles nothing" if waiting > STILL_AFTER_S else None

    async def _left_out(self) -> str | None:
        """Without partitions, as a member to spare is; wrong while the group has fewer members than partitions."""
        if any(client.assignment() for client in self._clients()):
            return None
        known = [client.partitions_for_topic(t.value) for client in self._clients() for t in self._consumer.topics]
        partitions = sum(len(found or ()) for found in known)
        admin = AIOKafkaAdminClient(**client_options(self._settings))
        try:
            async with asyncio.timeout(ANSWER_S):
                await admin.start()
                answers = await admin.describe_consumer_groups([self._consumer.group])
                members = sum(len(group[5]) for answer in answers for group in answer.groups)
        except Exception as error:
            return f"has no partitions, and its group cannot be asked ({error!r})"
        finally:
            await let_go(admin.close())
        return f"has none of {partitions} partitions in a group of {members}" if members <= partitions else None

    def _clients(self) -> list[AIOKafkaConsumer]:
        found = [getattr(subscriber, "consumer", None) for subscriber in self._broker.subscribers]
        return [client for client in found if client is not None]

    def _first_partitions(self) -> set[TopicPartition]:
        return {TopicPartition(topic.value, 0) for topic in self._consumer.topics}


async def within_reach(settings: Kafka, consumer: Consumer) -> bool:
    """Whether a fresh client gets the same answers; it joins no group."""
    client = AIOKafkaConsumer(
        **client_options(settings),
        group_id=consumer.group,
        enable_auto_commit=False,
        metadata_max_age_ms=60_000,
    )
    try:
        async with asyncio.timeout(ANSWER_S):
            await client.start()
            await _reach(client, {TopicPartition(topic.value, 0) for topic in consumer.topics})
    except Exception:
        return False
    finally:
        await let_go(client.stop(), 2)
    return True


async def _reach(client: AIOKafkaConsumer, partitions: Any) -> dict[TopicPartition, int]:
    """Ask the coordinator and the leaders: the ends of the partitions. Raises, or hangs, when one of them is not reached."""
    await client.committed(next(iter(partitions)))
    ends: dict[TopicPartition, int] = await client.end_offsets(list(partitions))
    return ends
