"""Whatever a gateway does, it does with both of its clients."""

from pathlib import Path
from typing import Literal, cast

import pytest

from mini_studio.settings import Api, Gateway, Kafka, Settings
from tests.fakes.broker import free_port

Client = Literal["fast", "plain"]


@pytest.fixture(params=["fast", "plain"])
def asked_by(request: pytest.FixtureRequest) -> Client:
    return cast("Client", request.param)


@pytest.fixture
def settings(tmp_path: Path, asked_by: Client) -> Settings:
    kafka, api = Kafka(bootstrap=f"127.0.0.1:{free_port()}"), Api(deploy_wait_s=5, max_body_bytes=1024 * 1024)
    return Settings(data=tmp_path, kafka=kafka, api=api, gateway=Gateway(client=asked_by))
