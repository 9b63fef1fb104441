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
from mini_studio.embedded.child import Child
from mini_studio.embedded.guardian import Guardian
from mini_studio.embedded.marks import PART, RUN_ID, Family
from mini_studio.embedded.probe import Verdict, probe
from mini_studio.embedded.stack import Stack, prepare_command

SOON_S, LATER_S = 0.2, 5.0
"""How often a part is looked at before and after it is healthy."""
ILL_FOR_S, NEVER_WELL_FOR_S = 60.0, 300.0
"""A part is started again when it was ill this long, or at once when it says so itself; a first answer may take a while."""
STOP_STUDIO_S, STOP_ALL_S, END_S = 6.0, 3.0, 4.0
"""How long parts get to end by themselves: first the studio's own, then all; then they are killed."""
SLOW_S = 60.0
CANNOT_START_PAUSE_S = 5.0


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
        self._children = [Child(part, self._logs, environment) for part in stack.parts]
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
        stopping: asyncio.Task[Any] = asyncio.create_task(self._stop.wait())
        try:
            # the work never ends by itself: when it does, that is a mistake of ours that must not go unseen
            await asyncio.wait([stopping, *tasks], return_when=asyncio.FIRST_COMPLETED)
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
        while True:
            if child.part.after_preparation and not (child.part.prepared_once and child.starts):
                await self._prepared.wait()
            if child.part.family and child.starts:
                await self._end_family(self._ray_family)
            pause_s, why = await self._live(child)
            if child.part.forgets:
                self._prepared.clear()
            if pause_s:
                self._say(f"{child.part.name}: {why}; starting it again in {pause_s:.1f} s, see {child.log}")
            await asyncio.sleep(pause_s)

    async def _live(self, child: Child) -> tuple[float, str]:
        """One life of a part: the pause until the next one, and how this one ended."""
        try:
            child.start()
        except OSError as error:
            return CANNOT_START_PAUSE_S, f"can't be started ({error})"
        while child.running:
            await self._wait_for_change()
        code, pause_s = child.ended()
        return pause_s, f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    async def _wait_for_change(self) -> None:
        """Until some child process may have ended."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), 1.0)
        await asyncio.sleep(0.02)
        self._changed.clear()

    async def _look_after(self, child: Child) -> None:
        """Follow the health of a part; end it when it has been ill for long."""
        while True:
            if child.running:
                await self._look_at(child)
            await asyncio.sleep(LATER_S if child.healthy else SOON_S)

    async def _look_at(self, child: Child) -> None:
        life = child.starts
        verdict = await probe(child.part.health)
        if life != child.starts or not child.running:
            return
        now = time.monotonic()
        if verdict in (Verdict.HEALTHY, Verdict.STARTING):
            child.well_at = now
        if verdict is Verdict.HEALTHY and not child.healthy:
            child.healthy = True
            self._say(f"  {child.part.name:<9} ready after {now - self._began:5.1f} s")
        patience_s = ILL_FOR_S if child.healthy else NEVER_WELL_FOR_S
        if verdict is Verdict.UNHEALTHY or now - child.well_at > patience_s:
            how = "says it is unhealthy" if verdict is Verdict.UNHEALTHY else f"ill for {now - child.well_at:.0f} s"
            self._say(f"{child.part.name}: {how}, ending it")
            child.signal(signal.SIGTERM)
            await asyncio.sleep(END_S)
            if life == child.starts:
                child.signal(signal.SIGKILL)

    async def _keep_prepared(self) -> None:
        """Prepare broker and bucket, and prepare them again whenever one of them has forgotten everything."""
        needed = [child for child in self._children if child.part.needed_to_prepare]
        children.rotate(self._logs / "prepare.log")
        while True:
            while not all(child.healthy for child in needed):
                await asyncio.sleep(0.05)
            lives = [child.starts for child in needed]
            process = children.spawn(self._prepare, self._logs / "prepare.log", self._environment)
            while process.poll() is None:
                await self._wait_for_change()
            if process.returncode:
                self._say(
                    f"prepare: failed (exit code {process.returncode}), trying again; see {self._logs / 'prepare.log'}"
                )
                await asyncio.sleep(2)
            elif lives == [child.starts for child in needed] and all(child.running for child in needed):
                self._prepared.set()
                self._say(f"  {'log':<9} ready after {time.monotonic() - self._began:5.1f} s (topics, bucket, history)")
                while self._prepared.is_set():
                    await asyncio.sleep(0.5)

    async def _announce(self) -> None:
        """The banner, once every part is healthy; until then, now and then, what is still missing."""
        said = self._began
        while missing := [child.part.name for child in self._children if not child.healthy]:
            if time.monotonic() - said > SLOW_S:
                said = time.monotonic()
                self._say(f"still waiting for {', '.join(missing)}; see {self._logs}")
            await asyncio.sleep(0.05)
        self._say(banner(self._stack.url, self._data, time.monotonic() - self._began))
        await self._stop.wait()

    async def _keep_watch(self) -> None:
        """Keep a guardian, and end with the parent."""
        while True:
            self._guardian.keep()
            if self._parent is not None and os.getppid() != self._parent:
                self._stop.set()
            await asyncio.sleep(1)

    async def _stop_all(self) -> None:
        """Nothing is left when this returns."""
        began = time.monotonic()
        self._say("stopping the studio")
        for child in self._children:
            if child.part.stopped_first:
                child.signal(signal.SIGTERM)
        await _until(lambda: not any(c.running for c in self._children if c.part.stopped_first), STOP_STUDIO_S)
        self._family.signal(signal.SIGTERM)
        await _until(lambda: not self._family.members(), STOP_ALL_S)
        self._family.end(quiet_s=0.3, limit_s=END_S, reap=self._reap)
        self._reap()
        self._guardian.dismiss()
        self._say(f"stopped after {time.monotonic() - began:.1f} s")

    async def _end_family(self, family: Family) -> None:
        while family.signal(signal.SIGKILL):
            await asyncio.sleep(SOON_S)

    def _reap(self) -> None:
        for child in self._children:
            child.running  # noqa: B018 - asking collects it


async def _until(condition: Callable[[], bool], limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while not condition() and time.monotonic() < limit:
        await asyncio.sleep(0.1)
