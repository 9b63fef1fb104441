"""`mini-studio events tail`, on a broker with more than one partition to a topic."""

import pytest

from events.types import new_id
from mini_studio.bus.kafka import Publisher, create_topics
from mini_studio.bus.relay import outgoing
from mini_studio.settings import Kafka, Settings
from mini_studio.tailing import tail
from tests.consumers.cases import envelope, fine_tune


async def told(bootstrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Events of a dozen jobs, which lie in all partitions, are all printed."""
    settings = Settings(kafka=Kafka(bootstrap=bootstrap, partitions=3, publish_timeout_s=60))
    await create_topics(settings.kafka)
    jobs = [new_id("job") for _ in range(12)]
    async with Publisher(settings.kafka) as publisher:
        await publisher.publish([outgoing(envelope(fine_tune(job), job).stored()) for job in jobs])
    await tail(settings, follow=False, subject=None, as_json=False)
    printed = capsys.readouterr().out
    assert [job for job in jobs if job not in printed] == []


async def test_every_partition_is_printed(bootstrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    await told(bootstrap, capsys)


@pytest.mark.real
async def test_every_partition_of_a_real_kafka_is_printed(
    real_bootstrap: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await told(real_bootstrap, capsys)
