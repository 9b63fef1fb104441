"""A block of ports for each studio, so that any number of them run side by side.

A block is claimed by a lock that lives as long as the studio: two studios that start at the same moment never take the same one. Blocks lie
below the range that systems hand out to outgoing connections.
"""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path

FIRST, SIZE, COUNT = 20_000, 250, 50
BACKLOG = 2048
FIXED = 30
"""Ports of a block that are given out by name; the others are those of Ray's workers."""


class PortBlock:
    """`SIZE` ports from `base` on. Keep the object: the claim ends with it."""

    def __init__(self, base: int, lock: int) -> None:
        self.base = base
        self._lock = lock

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < FIXED:
            raise IndexError(index)
        return self.base + index

    @property
    def workers(self) -> tuple[int, int]:
        """First and last port of Ray's workers."""
        return self.base + FIXED, self.base + SIZE - 1

    def release(self) -> None:
        os.close(self._lock)


def in_use(host: str, port: int) -> OSError | None:
    """Why nothing can listen there; None if something can."""
    try:
        listen(host, port).close()
    except OSError as error:
        return error
    return None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `OSError`."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def claim(preferred: int | None, avoid: Iterable[int] = ()) -> PortBlock:
    """The block at `preferred` if it is free, else the first free one without a port of `avoid`. Raises `OSError` if none is."""
    folder = Path(tempfile.gettempdir()) / f"mini-studio-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    bases = [FIRST + index * SIZE for index in range(COUNT)]
    for base in sorted(bases, key=lambda base: base != preferred):
        if any(base <= port < base + SIZE for port in avoid):
            continue
        lock = os.open(folder / str(base), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if all(in_use("127.0.0.1", base + index) is None for index in range(FIXED)):
            return PortBlock(base, lock)
        os.close(lock)
    raise OSError("no free block of ports between 20000 and 32500")
