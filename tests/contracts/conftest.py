"""Real systems that are started once per session."""

from collections.abc import Iterator

import pytest

from mini_studio.settings import S3
from tests.fakes.ray_head import RayHead, running_head
from tests.fakes.s3_servers import embedded_s3, real_s3


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """It wants its token."""
    with running_head("a-token-of-the-tests") as head:
        yield head


@pytest.fixture(scope="session", params=["embedded", pytest.param("real", marks=pytest.mark.real)])
def s3_settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """How to reach an S3 server."""
    folder = tmp_path_factory.mktemp("s3")
    with real_s3(folder) if request.param == "real" else embedded_s3(folder) as settings:
        yield settings
