"""Real services for tests, started by the scripts of a folder: `MINI_STUDIO_TEST_REAL=DIR`, which `make test-real` sets.

Each script takes `install`, `start DATA PORT`, `start DATA`, `stop DATA`, `kill DATA`, `pause DATA`, `resume DATA`.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

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
