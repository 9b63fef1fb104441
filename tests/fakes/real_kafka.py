"""A real Apache Kafka for tests: at the address given, or started by the script of a folder given.

`MINI_STUDIO_TEST_KAFKA=host:port` names a running one (of `docker compose`, for instance). What kills or pauses it needs the script.
"""

import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

from tests.fakes.real_services import SCRIPTS, Started, own, script_of

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


def own_kafka(folder: Path, *options: str) -> AbstractContextManager[RealKafka]:
    """One for this test alone, whose topics nobody else has made or filled. Skips where there is none to start."""
    return own(RealKafka, script(), HOW_TO_STOP_IT, folder, *options)
