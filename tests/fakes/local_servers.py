"""Stub model servers under the local process driver: how to start them, to count them, and to leave none behind."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from mini_studio.drivers.local_process import LocalProcessDriver, Start
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec
from mini_studio.drivers.servers import MARK

STUB = Path(__file__).with_name("model_server.py")


def stub_command(start: Start) -> list[str]:
    weights = str(start.weights or start.base_model)
    return [sys.executable, str(STUB), str(start.status_file), start.model, weights, start.host]


def all_servers(state_dir: Path) -> list[int]:
    """Pids of the servers that live, however they came to be."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mark = process.environ().get(MARK, "")
            if mark.startswith(str(state_dir.resolve()) + os.sep) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def end_all(state_dir: Path) -> None:
    for pid in all_servers(state_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def reconciled(
    driver: LocalProcessDriver, spec: ReleaseSpec, wanted: Callable[[ReleaseReport], bool]
) -> ReleaseReport:
    """Reconcile until the report is as wanted."""
    for _ in range(1500):
        await driver.apply(spec)
        report = await driver.observe(spec.name)
        if report is not None and wanted(report):
            return report
        await asyncio.sleep(0.02)
    raise AssertionError(f"it stayed {report}")
