"""Real systems that are started once per session."""

from collections.abc import Iterator

import pytest

from tests.fakes.ray_head import RayHead, running_head


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """It wants its token."""
    with running_head("a-token-of-the-tests") as head:
        yield head
