"""What has to hold of every consumer: it does its work once, however often and however badly it is told to."""

from typing import Any

import pytest

from events.topics import dead_letter_topic
from mini_studio.bus.kafka import Outgoing
from tests.consumers.cases import World, crash_after, eventually
from tests.fakes.log import read_all
from tests.fakes.waiting import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


async def test_it_does_its_work(world: World) -> None:
    events = await world.case.given(world.studio)
    await world.publish(events)
    assert await world.settled(events[0].subject)
    await eventually(lambda: has_decided(world, events[0].subject))


async def test_a_duplicate_changes_nothing(world: World) -> None:
    first, after = await world.case.given(world.studio), await world.case.given(world.studio)
    await world.publish(first)
    before = await world.settled(first[0].subject)
    for _ in range(3):
        await world.publish(first)
    await world.publish(after)
    await world.settled(after[0].subject)
    assert await world.settled(first[0].subject) == before
    await eventually(lambda: has_decided(world, after[0].subject))
    assert await world.decided(first[0].subject) == world.expected()


async def test_reordered_events_are_applied_in_order(world: World) -> None:
    events = await world.case.given(world.studio)
    await world.studio.store.journal([event.stored() for event in events])
    await world.publish(events[::-1])
    assert await world.settled(events[0].subject)


async def test_a_crash_after_the_effect_does_it_once(world: World) -> None:
    crashed = crash_after(world.studio, *world.case.effect)
    events = await world.case.given(world.studio)
    await world.publish(events)
    await world.settled(events[0].subject)
    await until(lambda: crashed)  # the write can be seen before its caller has heard of it
    await eventually(lambda: has_decided(world, events[0].subject))
    assert await world.decided(events[0].subject) == world.expected()


async def test_what_can_never_be_handled_is_put_aside_byte_for_byte(world: World) -> None:
    events = await world.case.given(world.studio)
    good = events[0].stored()
    broken = {name: text.encode() for name, text in good["headers"].items()}
    unknown = {**broken, "ce_type": b"of.tomorrow.v9"}
    lying = {**broken, "ce_source": b"/mini-studio/nobody"}
    for headers in (broken, unknown, lying):
        value = b'{"nothing": "of it"}' if headers is broken else good["value"].encode()
        await world.studio.publisher.publish(
            [Outgoing(world.case.topic, good["key"].encode(), value, list(headers.items()))]
        )
    await world.publish(events)
    await world.settled(events[0].subject)
    dead = [record for record in await dead_letters(world) if record.key == good["key"].encode()]
    assert [dict(record.headers)["ce_type"].decode() for record in dead] == [
        events[0].type, "of.tomorrow.v9", events[0].type,
    ]  # fmt: skip
    assert [record.value for record in dead] == [
        b'{"nothing": "of it"}',
        good["value"].encode(),
        good["value"].encode(),
    ]
    assert all(dict(record.headers)["dlq_reason"] for record in dead)


async def has_decided(world: World, subject: str) -> bool:
    return await world.decided(subject) == world.expected()


async def dead_letters(world: World) -> list[Any]:
    topic = dead_letter_topic(world.case.topic, world.case.consumer)
    return await read_all(world.studio.settings.kafka.bootstrap, topic)
