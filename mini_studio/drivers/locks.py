"""One release is changed by one driver at a time, whatever process it runs in."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mini_studio.errors import Unavailable

BUSY_S = 15.0
"""How long to wait for another driver to be done with a release."""


@contextmanager
def only_me(state_dir: Path, name: str) -> Iterator[None]:
    """Hold the release's lock, which the system drops when its holder dies. Turns `OSError` into `Unavailable`."""
    try:
        locks = state_dir / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / name).open("w") as lock:
            _wait_for(lock.fileno(), name)
            yield
    except OSError as error:
        at = error.filename or state_dir
        raise Unavailable(
            f"{name} cannot be served for now: {error.strerror or error} ({at}). Make room or make it accessible."
        ) from error


def _wait_for(lock: int, name: str) -> None:
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Unavailable(f"Another process is at work on {name}.") from None
            time.sleep(0.05)
