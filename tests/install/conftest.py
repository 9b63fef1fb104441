"""The chart, and the client that renders and installs it."""

import pytest

from tests.fakes.helm import Helm


@pytest.fixture(scope="session")
def helm() -> Helm:
    return Helm.found()
