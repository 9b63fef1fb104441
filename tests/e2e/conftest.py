"""A whole studio for these tests: the embedded stack, started once."""

from collections.abc import Iterator

import pytest

from tests.fakes.broker import free_port
from tests.fakes.running import Running


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("studio") / "data", free_port())
    running.start()
    yield running
    running.stop()
    assert running.children() == []
