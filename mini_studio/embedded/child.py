"""One part of the studio as a child process."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LOG_BYTES = 10 * 1024 * 1024
LOGS_KEPT = 3
LONGEST_PAUSE_S = 15.0
SETTLED_S = 30.0
"""A part that lived this long starts anew with the shortest pause."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Part:
    """What to run, and how to know that it works."""

    name: str
    command: list[str]
    health: str
    """`tcp://host:port` (it accepts connections) or an http URL that answers 200."""
    environment: dict[str, str] = field(default_factory=dict)
    after_preparation: bool = True
    """Waits until the broker and the bucket are prepared."""
    prepared_once: bool = False
    """Waits so before its first start alone: after that it works while the broker is down."""
    needed_to_prepare: bool = False
    forgets: bool = False
    """Comes back empty: the studio has to be prepared again."""
    family: bool = False
    """Leaves processes behind when it dies that have to go before it is started again."""
    restart_at_once: frozenset[int] = frozenset()
    """Exit codes that ask for a new process rather than tell of a failure."""
    stopped_first: bool = True
    sockets: tuple[int, ...] = ()
    """File descriptors of the supervisor that it inherits."""
    cwd: Path | None = None
    """Default: that of the supervisor."""


class Child:
    """The process of a part, and what is known of its health."""

    def __init__(self, part: Part, logs: Path, environment: dict[str, str]) -> None:
        self.part = part
        self.log = logs / f"{part.name}.log"
        self.healthy = False
        self.starts = 0
        self.well_at = 0.0
        """When it was last not ill, or started (monotonic)."""
        self.popen: subprocess.Popen[bytes] | None = None
        self._environment = {**environment, **part.environment}
        self._failures = 0
        self._started_at = 0.0

    @property
    def pid(self) -> int | None:
        return self.popen.pid if self.popen is not None else None

    @property
    def running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def start(self) -> None:
        """Raises `OSError` if the program can't be run."""
        self.healthy = False
        self.starts += 1
        self._started_at = self.well_at = time.monotonic()
        self.popen = spawn(self.part.command, self.log, self._environment, self.part.cwd, self.part.sockets)

    def ended(self) -> tuple[int, float]:
        """Note that it ended: the exit code, and the pause in seconds before it may be started again."""
        code = self.popen.returncode if self.popen is not None and self.popen.returncode is not None else -1
        asked_to = self.healthy and code in (0, -signal.SIGTERM)
        self.popen, self.healthy = None, False
        if asked_to or code in self.part.restart_at_once:
            return code, 0.0
        self._failures = 1 if time.monotonic() - self._started_at > SETTLED_S else self._failures + 1
        return code, min(LONGEST_PAUSE_S, 0.5 * 2 ** (self._failures - 1))

    def signal(self, signum: int) -> None:
        if self.popen is not None and self.popen.poll() is None:
            self.popen.send_signal(signum)


def spawn(
    command: list[str],
    log: Path,
    environment: dict[str, str],
    cwd: Path | None = None,
    sockets: tuple[int, ...] = (),
) -> subprocess.Popen[bytes]:
    """A child in a session of its own (a terminal's Ctrl-C does not reach it) that dies with this process on Linux."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=sockets,
            start_new_session=True,
            # the supervisor has one thread, so nothing can hold a lock across this fork
            preexec_fn=_dies_with_parent(),  # noqa: PLW1509
        )


def rotate(log: Path) -> None:
    """Keep the last `LOGS_KEPT` logs once one has grown over `LOG_BYTES`."""
    if not log.exists() or log.stat().st_size <= LOG_BYTES:
        return
    for number in range(LOGS_KEPT - 1, 0, -1):
        older = log.with_name(f"{log.name}.{number}")
        if older.exists():
            older.replace(log.with_name(f"{log.name}.{number + 1}"))
    log.replace(log.with_name(f"{log.name}.1"))


def _dies_with_parent() -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask
