"""Real systems that are started once per session."""

from collections.abc import Iterator

import pytest

from tests.fakes.ray_head import RayHead


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    head = RayHead()
    try:
        head.wait()
        yield head
    finally:
        head.close()
