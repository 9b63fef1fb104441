"""`python killed_driver.py STATE_DIR MODELS_ROOT EVERY`: kill -9 of a driver at every EVERY-th line it runs, and a look at what is left.

For each point: a forked driver applies (or removes) and is killed there; others then apply until there is one server, never two; one
removes; there must be none, and no folder. Exits 1 and prints the point where that is not so.
"""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from events.types import DeploymentKind
from mini_studio.drivers import local_process
from mini_studio.drivers.local_process import LocalProcessDriver
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.settings import Serving
from tests.fakes.local_servers import all_servers, stub_command

DRIVERS = str(Path(local_process.__file__).parent)
SPEC = ReleaseSpec("a", "dep_" + "1" * 24, 1, DeploymentKind.BASE, "", "tiny", "tiny", None, 0, 1, 1, 5)


class Lines:
    """Counts the lines of the drivers that run, and kills this process at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at, self.ran = kill_at, 0

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> "Lines | None":
        if not frame.f_code.co_filename.startswith(DRIVERS):
            return None
        if event == "line":
            self.ran += 1
            if self.ran == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def act(what: str, state_dir: Path, models_root: Path, kill_at: int = 0) -> int:
    """Apply or remove; the number of lines that it took."""
    lines = Lines(kill_at)

    async def go() -> None:
        driver = LocalProcessDriver(state_dir, models_root, Serving(threads=1), command=stub_command)
        if what == "apply":
            await driver.apply(SPEC)
        else:
            await driver.remove(SPEC.name, SPEC.deployment_id, SPEC.generation)

    threading.settrace(lines)
    asyncio.run(go())
    threading.settrace(None)  # type: ignore[arg-type]
    return lines.ran


def killed(what: str, at: int, state_dir: Path, models_root: Path) -> None:
    child = os.fork()
    if child == 0:
        act(what, state_dir, models_root, at)
        os._exit(0)
    os.waitpid(child, 0)


def counted(state_dir: Path, wanted: int) -> bool:
    """Whether there are as many servers as wanted; one that was just forked shows its mark a moment later."""
    for _ in range(40):
        if len(all_servers(state_dir)) == wanted:
            return True
        time.sleep(0.05)
    return False


def repaired(state_dir: Path, models_root: Path) -> bool:
    """Whether one server comes of a few looks, and stays at the next one: at the first, one that was told to end may still live."""
    in_a_row = 0
    for _ in range(6):
        act("apply", state_dir, models_root)
        in_a_row = in_a_row + 1 if counted(state_dir, 1) else 0
        if in_a_row == 2:
            return True
    return False


def main() -> int:
    state_dir, models_root, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    lines = {what: act(what, state_dir, models_root) for what in ("apply", "remove")}
    print("lines", lines, flush=True)
    for what, total in lines.items():
        for at in range(1, total + 1, every):
            if what == "remove":
                act("apply", state_dir, models_root)
            killed(what, at, state_dir, models_root)
            one = repaired(state_dir, models_root)
            act("remove", state_dir, models_root)
            if not (one and counted(state_dir, 0)) or (state_dir / SPEC.name).exists():
                print(f"killed at line {at} of {what}: {all_servers(state_dir)}", flush=True)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
