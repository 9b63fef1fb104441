"""Which processes belong to a run of the studio: those whose environment says so, and their relatives.

Ray's workers write their title over their environment, so a marked process stands for its session and its descendants too.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

RUN_ID = "MINI_STUDIO_RUN_ID"
RUN_DATA = "MINI_STUDIO_RUN_DATA"
PART = "MINI_STUDIO_PART"

LOOK_EVERY_S = 0.2


class Family:
    """The processes that carry all of `wanted` in their environment, and their relatives.

    Sessions are remembered: a worker whose marked relatives are gone already is still found. Never counts this process, its ancestors,
    their sessions, or the processes in `spared`.
    """

    def __init__(self, wanted: dict[str, str], *, spared: Iterable[int] = ()) -> None:
        self._wanted = wanted
        self._spared = {os.getpid(), *spared}
        self._sessions: set[int] = set()

    def members(self) -> list[psutil.Process]:
        """Those alive now."""
        alive = {process.pid: process for process in psutil.process_iter() if _alive(process)}
        strangers = self._spared | _ancestors()
        foreign_sessions = {0, *map(_session, strangers)}
        marked = {pid for pid, process in alive.items() if pid not in strangers and self._carries(process)}
        self._sessions |= {_session(pid) for pid in marked} - foreign_sessions
        found = marked | {pid for pid in alive if _session(pid) in self._sessions - foreign_sessions}
        found |= _descendants(found, alive)
        return [alive[pid] for pid in sorted(found - strangers)]

    def signal(self, signum: int) -> int:
        """Send a signal to every member; how many there were."""
        members = self.members()
        for process in members:
            try:
                process.send_signal(signum)
            except psutil.Error:
                continue
        return len(members)

    def end(self, *, quiet_s: float, limit_s: float, reap: Callable[[], object] = lambda: None) -> bool:
        """SIGKILL until none was seen for `quiet_s`; False if some were still there after `limit_s`.

        `reap` collects this process's own children, so that none stays as a zombie.
        """
        now = time.monotonic()
        last_seen, limit = now, now + limit_s
        while now - last_seen < quiet_s:
            if self.signal(signal.SIGKILL):
                last_seen = now
            reap()
            if now > limit:
                return False
            time.sleep(min(LOOK_EVERY_S, quiet_s))
            now = time.monotonic()
        return True

    def _carries(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            return False
        return all(environment.get(name) == value for name, value in self._wanted.items())


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def _ancestors() -> set[int]:
    try:
        return {process.pid for process in psutil.Process().parents()}
    except psutil.Error:
        return set()


def _descendants(roots: set[int], alive: dict[int, psutil.Process]) -> set[int]:
    parents = {}
    for pid, process in alive.items():
        try:
            parents[pid] = process.ppid()
        except psutil.Error:
            continue
    found, frontier = set[int](), roots
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier} - found - roots
        found |= frontier
    return found
