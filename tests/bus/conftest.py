"""A real broker for each of these tests: the embedded one, on a free port. A log has one journal, which says what is genuine."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mini_studio.bus.kafka import create_topics
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import COLLECTIONS, Studio, open_studio
from tests.fakes.broker import running_broker


@pytest.fixture
def bootstrap() -> Iterator[str]:
    with running_broker() as address:
        yield address


@pytest.fixture
async def studio(bootstrap: str, tmp_path: Path) -> AsyncIterator[Studio]:
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=bootstrap, partitions=1))
    await create_topics(settings.kafka)
    async with open_studio(settings, relayed=COLLECTIONS) as studio:
        yield studio
