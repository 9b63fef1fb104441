"""A real Apache Kafka for tests: at the address given, or started by the script of a folder given.

`MINI_STUDIO_TEST_KAFKA=host:port` names a running one (of `docker compose`, for instance). `MINI_STUDIO_TEST_REAL=DIR`, which
`make test-real` sets, names a folder with a script `kafka`: `install`, `start DATA PORT [key=value ...]`, `start DATA`, `stop DATA`,
`kill DATA`, `pause DATA`, `resume DATA`. Tests that kill or pause the broker need the script.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.broker import lasting_port

ADDRESS, SCRIPTS = "MINI_STUDIO_TEST_KAFKA", "MINI_STUDIO_TEST_REAL"
HOW = f"needs a real Apache Kafka: run `make test-real`, or set {ADDRESS}=host:port"
HOW_TO_STOP_IT = (
    f"kills and pauses a real Apache Kafka: run `make test-real`, or set {SCRIPTS} to a folder with the script `kafka`"
)


def script() -> Path | None:
    """The script that starts and stops a Kafka, if there is one."""
    folder = os.environ.get(SCRIPTS)
    return Path(folder).resolve() / "kafka" if folder else None


@dataclass
class RealKafka:
    """One broker started by the script, with its data in `data`."""

    script: Path
    data: Path
    port: int

    @classmethod
    def start(cls, script: Path, data: Path, *options: str) -> "RealKafka":
        """`options` are server properties, `key=value`. Raises `CalledProcessError` when it does not come up."""
        kafka = cls(script, data, lasting_port())
        kafka.start_first(*options)
        return kafka

    def start_first(self, *options: str) -> None:
        subprocess.run([str(self.script), "install"], check=True, stdout=subprocess.DEVNULL)
        self._call("start", str(self.port), *options)

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

    def start_again(self) -> None:
        self._call("start")

    def stop(self) -> None:
        self._call("stop")

    def kill(self) -> None:
        self._call("kill")

    def pause(self) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def _call(self, verb: str, *rest: str) -> None:
        subprocess.run([str(self.script), verb, str(self.data), *rest], check=True, stdout=subprocess.DEVNULL)


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
