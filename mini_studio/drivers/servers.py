"""One model server process on this machine, kept in files so that it outlives whoever started it.

A server `<n>` of a release lies in the release's folder:

    <n>.lock          locked by the server process itself for as long as it lives: it inherits the locked descriptor, so not even a
                      kill -9 of the driver right after the start can make a second server out of one
    <n>.proc.json     `Process`: the pid to signal, and the crashes in a row
    <n>.status.json   `workloads.specs.ServerStatus`, written by the server
    <n>.log           its output, cut at the front when it grows
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from pydantic import ValidationError

from mini_studio.files import replace_file
from workloads.specs import ServerStatus

MARK = "MINI_STUDIO_SERVER"
"""Environment variable of a server: its lock file. Tells it from every other process when its pid was never written down."""
STOP_S = 5.0
"""From SIGTERM to SIGKILL."""
SHORT_LIFE_S = 30.0
"""A server that lived longer starts with a clean slate when it dies."""
LOG_BYTES = 8 * 1024 * 1024
LOG_KEPT = 256 * 1024
LOG_LINES = 12


@dataclass(frozen=True)
class Process:
    """What is known of a server's process. `create_time` guards against a pid that now is somebody else's."""

    pid: int | None = None
    create_time: float = 0.0
    started_at: float = 0.0
    crashes: int = 0
    """In a row; a server that lived a while resets them."""
    next_start_at: float = 0.0
    gave_up: str | None = None
    """Why it is not started again: for the user, with what to do."""


class Server:
    """One server slot. The methods block for milliseconds, `stop` for seconds; the release's lock must be held around them."""

    def __init__(self, folder: Path, index: int) -> None:
        self.index = index
        self.lock_file = folder / f"{index}.lock"
        self.status_file = folder / f"{index}.status.json"
        self.process_file = folder / f"{index}.proc.json"
        self.log_file = folder / f"{index}.log"

    def alive(self) -> bool:
        """Whether a process has this slot, known or not, starting or running. A dead one that nobody waited for has not."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who look do not see each other
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """Start it, detached; None when a process has the slot. Raises `OSError`."""
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.status_file.unlink(missing_ok=True)
            self.write(replace(self.process(), pid=None, started_at=time.time()))
            with self.log_file.open("ab") as log:
                popen = subprocess.Popen(
                    command,
                    env={**environment, MARK: str(self.lock_file)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=(descriptor,),
                )
        except BlockingIOError:
            return None
        finally:
            os.close(descriptor)
        self._remember(popen.pid)
        return popen

    def process(self) -> Process:
        try:
            return Process(**json.loads(self.process_file.read_text()))
        except (OSError, ValueError, TypeError):
            return Process()

    def write(self, process: Process) -> None:
        replace_file(self.process_file, json.dumps(asdict(process)))

    def status(self) -> ServerStatus | None:
        """What the server says of itself. Only a live server's word counts, except for why it failed."""
        try:
            return ServerStatus.model_validate_json(self.status_file.read_bytes())
        except (OSError, ValidationError):
            return None

    def adopt(self) -> bool:
        """Find the process of a slot that is alive, if its pid is not known; False while it cannot be found yet."""
        if self._psutil() is not None:
            return True
        for candidate in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if candidate.environ().get(MARK) == str(self.lock_file) and candidate.pid == os.getpgid(candidate.pid):
                    self._remember(candidate.pid)
                    return True
        return False

    def terminate(self) -> bool:
        """SIGTERM: it finishes what it has begun. False while its process cannot be found."""
        found = self._psutil() if self.adopt() else None
        with contextlib.suppress(psutil.NoSuchProcess):
            if found is not None:
                found.terminate()
        return found is not None

    def stop(self) -> None:
        """SIGTERM, 5 s, SIGKILL, with its children. Returns when the slot is free, or when its process cannot be found."""
        if not self.alive() or not self.adopt():
            return
        self.terminate()
        if not self._gone(STOP_S) and (found := self._psutil()) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(found.pid, signal.SIGKILL)
            self._gone(STOP_S)

    def log_tail(self) -> list[str]:
        with contextlib.suppress(OSError), self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - 16 * 1024))
            lines = log.read().decode(errors="replace").splitlines()
            return [line[:500] for line in lines if line.strip()][-LOG_LINES:]
        return []

    def bound_log(self) -> None:
        """Keep the end of a log that has grown too large. The server appends, so it goes on writing behind what is kept."""
        with contextlib.suppress(OSError):
            size = self.log_file.stat().st_size
            if size > LOG_BYTES:
                with self.log_file.open("rb") as log:
                    log.seek(size - LOG_KEPT)
                    kept = log.read()
                os.truncate(self.log_file, 0)
                with self.log_file.open("ab") as log:
                    log.write(kept.partition(b"\n")[2])

    def _remember(self, pid: int) -> None:
        created = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            created = psutil.Process(pid).create_time()
        self.write(replace(self.process(), pid=pid, create_time=created))

    def _psutil(self) -> psutil.Process | None:
        known = self.process()
        if known.pid is None:
            return None
        try:
            found = psutil.Process(known.pid)
            same = abs(found.create_time() - known.create_time) < 0.01 and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return found if same else None

    def _gone(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while self.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def servers_in(folder: Path) -> list[Server]:
    """The slots that were ever used in a release's folder, by index."""
    found = [int(path.stem) for path in folder.glob("*.lock") if path.stem.isdigit()]
    return [Server(folder, index) for index in sorted(found)]
