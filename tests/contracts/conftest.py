"""Real systems that are started once per session."""

from collections.abc import Iterator

import pytest

from tests.fakes.ray_head import RayHead, running_head


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    with running_head() as head:
        yield head
