"""A part that answers `/health`, leaves a child in a session of its own, and ignores SIGTERM if told so. It is ill as long as its file
`.ill` is there, which it removes when it starts."""

import http.server
import os
import signal
import subprocess
import sys
from pathlib import Path


class Health(http.server.BaseHTTPRequestHandler):
    ill: Path

    def do_GET(self) -> None:
        body = b'{"status": "unhealthy"}' if self.ill.exists() else b"{}"
        self.send_response(503 if self.ill.exists() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def note(name: str, pid: int) -> None:
    file = Path(os.environ["MINI_STUDIO_DATA"]) / "pids" / f"{name}.pid"
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".new")
    temporary.write_text(str(pid))
    temporary.replace(file)


def main() -> None:
    name, port, *options = sys.argv[1:]
    if "stubborn" in options:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "parent" in options:
        orphan = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        note(f"{name}-orphan", orphan.pid)
    Health.ill = Path(os.environ["MINI_STUDIO_DATA"]) / f"{name}.ill"
    Health.ill.unlink(missing_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Health)
    note(name, os.getpid())
    server.serve_forever()


main()
