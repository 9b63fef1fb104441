"""Settings of every subscriber that keep events from being lost; FastStream's defaults lose them."""

import re
from pathlib import Path

import pytest
from faststream import AckPolicy

from consumers.app import CONSUMERS
from mini_studio.bus.kafka import READERS
from mini_studio.settings import Settings
from mini_studio.wiring import Studio


@pytest.mark.parametrize("name", CONSUMERS)
def test_nothing_is_acknowledged_before_it_is_handled(name: str, tmp_path: Path) -> None:
    studio = Studio(Settings(data=tmp_path))
    broker = CONSUMERS[name].broker(studio.settings.kafka, studio.publisher, studio)
    assert {name for s in broker.subscribers for name in s.topic_names} == {topic.value for topic in READERS[name]}
    for subscriber in broker.subscribers:
        assert subscriber.ack_policy is AckPolicy.NACK_ON_ERROR
        assert subscriber.group_id == f"mini-studio.{name}"
        assert subscriber._connection_args["auto_offset_reset"] == "earliest"
        assert subscriber._connection_args["enable_auto_commit"] is False


def test_there_are_no_other_subscribers() -> None:
    """What is asserted above holds for all of them: each consumer that there is runs, and nothing else subscribes."""
    assert set(CONSUMERS) == set(READERS)
    root = Path(__file__).parents[2]
    sources = [file for folder in ("api", "consumers", "mini_studio") for file in (root / folder).rglob("*.py")]
    subscribing = [file for file in sources if re.search(r"[.@]subscriber\(", file.read_text())]
    assert [str(file.relative_to(root)) for file in subscribing] == ["mini_studio/bus/consumer.py"]


def test_no_two_consumers_share_a_group() -> None:
    assert len({consumer.group for consumer in CONSUMERS.values()}) == len(CONSUMERS)
