"""Real services for tests, started by the scripts of a folder: `MINI_STUDIO_TEST_REAL=DIR`, which `make test-real` sets.

Each script takes `install`, `start DATA PORT`, `start DATA`, `stop DATA`, `kill DATA`, `pause DATA`, `resume DATA`.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import pytest

from tests.fakes.broker import lasting_port

SCRIPTS = "MINI_STUDIO_TEST_REAL"


def script_of(service: str) -> Path | None:
    """The script that starts and stops a service, if there is one."""
    folder = os.environ.get(SCRIPTS)
    return Path(folder).resolve() / service if folder else None


@dataclass
class Started:
    """One service started by its script, with its data in `data`. The calls raise `CalledProcessError`."""

    script: Path
    data: Path
    port: int

    @classmethod
    def start(cls, script: Path, data: Path, *options: str) -> Self:
        """`options` are the service's own, such as a server's properties, `key=value`."""
        started = cls(script, data, lasting_port())
        started.start_first(*options)
        return started

    def start_first(self, *options: str) -> None:
        subprocess.run([str(self.script), "install"], check=True, stdout=subprocess.DEVNULL)
        self.call("start", str(self.port), *options)

    def start_again(self) -> None:
        self.call("start")

    def stop(self) -> None:
        self.call("stop")

    def kill(self) -> None:
        self.call("kill")

    def pause(self) -> None:
        self.call("pause")

    def resume(self) -> None:
        self.call("resume")

    def call(self, verb: str, *rest: str) -> None:
        subprocess.run([str(self.script), verb, str(self.data), *rest], check=True, stdout=subprocess.DEVNULL)


S = TypeVar("S", bound=Started)


@contextlib.contextmanager
def own(service: type[S], script: Path | None, how: str, folder: Path, *options: str) -> Iterator[S]:
    """One for who asks alone. Skips, and says how to have one, where there is no script to start it."""
    if script is None:
        pytest.skip(how)
    started = service.start(script, folder, *options)
    try:
        yield started
    finally:
        started.stop()  # which resumes a paused one
