"""`/health` and `/metrics` of the processes that have no REST API: a thread with the standard library's server."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

STUCK_AFTER_S = 30.0


class Health:
    """What a process says of itself: `ok`, `starting`, `degraded` (works, with a reason) or `unhealthy` (restart it)."""

    def __init__(self) -> None:
        self.starting: set[str] = set()
        """What has to come up before the process counts as started."""
        self.checks: dict[str, Callable[[], str | None]] = {}
        """Name -> function that gives the problem, or None."""
        self.vital: dict[str, Callable[[], str | None]] = {}
        """The same for what only a new process cures."""
        self._beat = time.monotonic()

    def report(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body."""
        silent = time.monotonic() - self._beat
        if silent > STUCK_AFTER_S:
            return 503, {"status": "unhealthy", "reason": f"the event loop has been blocked for {silent:.0f} s"}
        lost = {name: problem for name, check in self.vital.items() if (problem := check())}
        if lost:
            return 503, {"status": "unhealthy", "problems": lost}
        if self.starting:
            return 503, {"status": "starting", "waiting_for": sorted(self.starting)}
        problems = {name: problem for name, check in self.checks.items() if (problem := check())}
        if problems:
            return 200, {"status": "degraded", "problems": problems}
        return 200, {"status": "ok"}

    async def beat(self) -> None:
        """Show, until cancelled, that the event loop turns."""
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(1)


def serve_health(health: Health, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Answer on `port` (0: any free one) in a daemon thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest())
            elif self.path == "/health":
                status, body = health.report()
                self._answer(status, "application/json", json.dumps(body).encode())
            else:
                self._answer(404, "application/json", b'{"ok": false, "error": "only /health and /metrics"}')

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
