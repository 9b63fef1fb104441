"""Stub model servers under the local process driver: how to start them, to count them, and to leave none behind."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil

from mini_studio.drivers.local_process import Start
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
