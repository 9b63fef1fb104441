"""Starts the parts, keeps them alive, and stops all of them.

Everything runs in one thread: parts are forked from it, and on Linux they die with the thread that forked them.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from mini_studio.embedded import child as children
from mini_studio.embedded.banner import banner
from mini_studio.embedded.child import Child, Part
from mini_studio.embedded.guardian import Guardian
from mini_studio.embedded.marks import PART, RUN_ID, Family
from mini_studio.embedded.probe import Verdict, probe
from mini_studio.embedded.stack import Stack, prepare_command

SOON_S, LATER_S = 0.2, 5.0
"""How often a part is looked at before and after it is healthy."""
ILL_FOR_S = 60.0
"""A part that has been ill this long is started again."""
STOP_STUDIO_S, STOP_ALL_S, END_S = 6.0, 3.0, 4.0
"""How long parts get to end by themselves: first the studio's own, then all; then they are killed."""
SLOW_S = 60.0


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


class Supervisor:
    """One run of the studio. `parent`: the process to end with, if any."""

    def __init__(
        self,
        stack: Stack,
        data: Path,
        run_id: str,
        environment: dict[str, str],
        guardian: Guardian,
        parent: int | None = None,
        *,
        prepare: list[str] | None = None,
        say: Callable[[str], None] = _say,
    ) -> None:
        self._stack, self._data, self._guardian, self._parent = stack, data, guardian, parent
        self._environment, self._logs = environment, data / "logs"
        self._family = Family({RUN_ID: run_id})
        self._ray_family = Family({RUN_ID: run_id, PART: "ray"})
        self._children = [Child(part, self._logs, environment, data / "run") for part in stack.parts]
        self._prepare = prepare or prepare_command()
        self._say = say
        self._began = time.monotonic()
        self._stop, self._prepared = asyncio.Event(), asyncio.Event()
        self._changed = asyncio.Event()
        """Some child process ended."""

    async def run(self) -> int:
        """Until a signal asks to stop; 0 once nothing is left."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self._stop.set)
        loop.add_signal_handler(signal.SIGCHLD, self._changed.set)
        self._guardian.keep()
        self._say(f"starting the studio in {self._data}, process {os.getpid()}")
        work: list[Coroutine[Any, Any, None]] = [self._announce(), self._keep_prepared(), self._keep_watch()]
        work += [self._keep(child) for child in self._children]
        work += [self._look_after(child) for child in self._children]
        tasks = [asyncio.create_task(coroutine) for coroutine in work]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            # `_announce` ends when all is well; any other end is a mistake of ours that must not go unseen
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            await asyncio.gather(stopping, *tasks, return_exceptions=True)
            await self._stop_all()
        return 0

    async def _keep(self, child: Child) -> None:
        """Start a part, and start it again whenever it ends."""
        children.rotate(child.log)
        if child.part.after_preparation:
            await self._prepared.wait()
        while True:
            if child.part.family and child.starts:
                await asyncio.to_thread(self._ray_family.end, quiet_s=0.5, limit_s=10)
            child.start()
            while child.running:
                await self._wait_for_change()
            code, pause_s = child.ended()
            if child.part.prepared_by:
                self._prepared.clear()
            if pause_s:
                self._say(f"{child.part.name} ended ({_reason(code)}), starting it again in {pause_s:.1f} s; see {child.log}")
            await asyncio.sleep(pause_s)

    async def _wait_for_change(self) -> None:
        """Until some child process may have ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), 1.0)
        await asyncio.sleep(0.02)
        self._changed.clear()
