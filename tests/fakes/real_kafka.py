"""A real Apache Kafka for tests: at the address given, or started by the script of a folder given.

`MINI_STUDIO_TEST_KAFKA=host:port` names a running one (of `docker compose`, for instance). What kills or pauses it needs the script.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import lasting_port
from tests.fakes.real_services import SCRIPTS, Started, script_of

ADDRESS = "MINI_STUDIO_TEST_KAFKA"
HOW = f"needs a real Apache Kafka: run `make test-real`, or set {ADDRESS}=host:port"
HOW_TO_STOP_IT = (
    f"kills and pauses a real Apache Kafka: run `make test-real`, or set {SCRIPTS} to a folder with the script `kafka`"
)


def script() -> Path | None:
    """The script that starts and stops a Kafka, if there is one."""
    return script_of("kafka")


class RealKafka(Started):
    """One broker started by the script."""

    @classmethod
    def start(cls, script: Path, data: Path, *options: str) -> "RealKafka":
        """`options` are server properties, `key=value`."""
        kafka = cls(script, data, lasting_port())
        kafka.start_first(*options)
        return kafka

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def pids(self) -> list[int]:
        """Of the broker, while it runs."""
        status = subprocess.run(
            [str(self.script), "status", str(self.data)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        return [int((self.data / "pid").read_text())] if status.returncode == 0 else []


@contextlib.contextmanager
def own_kafka(folder: Path) -> Iterator[RealKafka]:
    """One for this test alone, whose topics nobody else has made or filled. Skips where there is none to start."""
    found = script()
    if found is None:
        pytest.skip(HOW_TO_STOP_IT)
    kafka = RealKafka.start(found, folder)
    try:
        yield kafka
    finally:
        kafka.stop()
