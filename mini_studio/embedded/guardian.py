"""Ends what a killed supervisor leaves behind: `python -m mini_studio.embedded.guardian RUN_ID FD FOLDER...`.

FD is the reading end of a pipe from the supervisor. A byte on it means that all is stopped; its end without one, that the supervisor
was killed. Then every process of the run is killed, and the FOLDERs (Ray's temporary ones) are removed.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mini_studio.embedded.marks import RUN_ID, Family

QUIET_S = 2.0
LIMIT_S = 60.0


class Guardian:
    """The supervisor's handle on its guardian."""

    def __init__(self, run_id: str, folders: list[Path], environment: dict[str, str]) -> None:
        self._run_id, self._folders, self._environment = run_id, folders, environment
        self._writer = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def keep(self) -> None:
        """Start it, or start it again if it is gone."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._writer >= 0:
            os.close(self._writer)
        reader, self._writer = os.pipe()
        command = [sys.executable, "-m", __spec__.name, self._run_id, str(reader), *map(str, self._folders)]
        self._process = subprocess.Popen(
            command,
            env=self._environment,
            pass_fds=[reader],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reader)

    def dismiss(self) -> None:
        """All is stopped: let it go, and wait until it has gone."""
        if self._process is None:
            return
        try:
            os.write(self._writer, b"x")
            self._process.wait(timeout=2)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._writer)
        self._process = None


def main() -> None:
    run_id, reader, *folders = sys.argv[1:]
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if os.read(int(reader), 1):
        return
    Family({RUN_ID: run_id}).end(quiet_s=QUIET_S, limit_s=LIMIT_S)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
