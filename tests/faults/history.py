"""What a client did, as it can still be told after everything else was killed: a line is on the disk before each request leaves."""

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Request:
    """One request, with what became of it. A repeat under the same Idempotency-Key is a request of its own."""

    request_id: str
    """Its `X-Request-ID`, which every event that follows from it carries as its correlation id."""
    kind: str
    """`upload`, `delete`, `submit`, `cancel`, `deploy` or `remove`."""
    client_code: str
    key: str | None = None
    """Its Idempotency-Key."""
    status: int | None = None
    """HTTP status; None: no answer came, so nobody knows whether it was done."""
    subject: str | None = None
    """The dataset, job or deployment of an answer of 2xx."""
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def acknowledged(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class History:
    """Writes the lines. `asked` returns only when the line is durable. Safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()

    def asked(self, request: Request) -> None:
        """Before the request leaves."""
        self._write(
            {"asked": request.request_id, "kind": request.kind, "client_code": request.client_code, "key": request.key}
            | {"body": request.body, "time": time.time()}
        )

    def answered(self, request: Request) -> None:
        """After the answer came."""
        line = {"answered": request.request_id, "status": request.status, "subject": request.subject}
        self._write({**line, "time": time.time()})

    def _write(self, line: dict[str, Any]) -> None:
        with self._lock:
            os.write(self._descriptor, json.dumps(line).encode() + b"\n")
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read(file: Path) -> dict[str, Request]:
    """Every request by its id."""
    requests: dict[str, Request] = {}
    for line in _lines(file):
        if "asked" in line:
            requests[line["asked"]] = Request(
                line["asked"], line["kind"], line["client_code"], line["key"], body=line["body"]
            )
        else:
            request = requests[line["answered"]]
            request.status, request.subject = line["status"], line["subject"]
    return requests


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().split(b"\n"):
        if line:
            yield json.loads(line)
