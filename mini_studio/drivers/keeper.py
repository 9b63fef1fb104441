"""Keeps model server processes running: starts, restarts with a growing pause, gives up, ends. Blocking; call it in a thread."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from mini_studio.drivers.servers import SHORT_LIFE_S, Process, Server, servers_in
from mini_studio.errors import Unavailable
from workloads import specs

log = structlog.get_logger(__name__)

LONGEST_PAUSE_S = 30.0


class Keeper:
    """Remembers its children, to collect them, and what it has looked at; all else stands in the servers' files."""

    def __init__(self, *, max_restarts: int, backoff_s: float) -> None:
        self._max_restarts = max_restarts
        self._backoff_s = backoff_s
        self._children: dict[Path, subprocess.Popen[bytes]] = {}
        self._looked_at: set[Path] = set()

    def keep(self, server: Server, command: Callable[[], Sequence[str]]) -> None:
        """Leave a live server alone, start a dead one when its time has come. Raises `OSError`."""
        self._collect(server)
        if server.alive():
            self._looked_at.add(server.lock_file)
            if server.adopt():
                server.bound_log()
            return
        known = self._take_note_of_death(server)
        if known.gave_up is None and time.time() >= known.next_start_at:
            popen = server.start(command(), environment())
            if popen is not None:
                self._children[server.lock_file] = popen
                log.info("serving.server_started", server=str(server.lock_file), pid=popen.pid)

    def forgive(self, content: Path) -> None:
        """A new generation starts with a clean slate, also where its content failed before."""
        for server in servers_in(content):
            self.forgive_one(server)

    def forgive_one(self, server: Server) -> None:
        self._collect(server)
        if server.lock_file.exists() and not server.alive():
            server.write(Process())

    def end(self, server: Server) -> None:
        """Returns when the server is gone. Raises `Unavailable` if it will not go."""
        server.stop()
        self._collect(server)
        if server.alive():
            raise Unavailable(f"A model server cannot be ended yet: {server.lock_file}")
        self._children.pop(server.lock_file, None)
        self._looked_at.discard(server.lock_file)

    def discard(self, content: Path) -> None:
        """End all servers of a content and delete their files."""
        for server in servers_in(content):
            self.end(server)
        shutil.rmtree(content, ignore_errors=True)

    def collect_all(self) -> None:
        for popen in self._children.values():
            popen.poll()

    def _collect(self, server: Server) -> None:
        """Wait for a child that has ended: the kernel keeps its entry until then."""
        if (popen := self._children.get(server.lock_file)) is not None:
            popen.poll()

    def _take_note_of_death(self, server: Server) -> Process:
        """Count a crash, once, and say when to start again, or why not."""
        known, first_look = server.process(), server.lock_file not in self._looked_at
        self._looked_at.add(server.lock_file)
        if first_look:
            # it went with its studio, or before: that is no crash, and what failed then may work now
            known = Process()
        elif known.pid is not None:
            known = self._after_crash(server, known)
        else:
            return known
        if server.lock_file.exists():
            server.write(known)
        return known

    def _after_crash(self, server: Server, known: Process) -> Process:
        popen = self._children.pop(server.lock_file, None)
        code = popen.returncode if popen is not None else None
        log.warning("serving.server_ended", server=str(server.lock_file), pid=known.pid, exit_code=code)
        said = server.status()
        if said is not None and said.state == "failed":
            why = said.error or f"The model server gave up and did not say why; its log is {server.log_file}"
            return replace(known, pid=None, gave_up=why)
        crashes = 1 if time.time() - known.started_at > SHORT_LIFE_S else known.crashes + 1
        if crashes > self._max_restarts:
            return replace(known, pid=None, crashes=crashes, gave_up=_crashed(server, crashes, code))
        pause_s = min(LONGEST_PAUSE_S, self._backoff_s * 2 ** (crashes - 1))
        return replace(known, pid=None, crashes=crashes, next_start_at=time.time() + pause_s)


def _crashed(server: Server, crashes: int, code: int | None) -> str:
    with_code = "" if code is None else f", at last with exit code {code}"
    hint = " (killed: most often for want of memory)" if code == -9 else ""
    tail = " | ".join(server.log_tail()) or "nothing"
    return (
        f"The model server ended {crashes} times in a row{with_code}{hint}. Mend what the end of its log says, "
        f"then deploy again. {server.log_file} ends: {tail}"
    )


def environment() -> dict[str, str]:
    """This process's own, so whoever ends the studio's processes by their environment finds the servers too."""
    package = str(Path(specs.__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, inherited] if inherited else [package])}
