"""`python -m tests.fakes.model_server STATUS_FILE MODEL WEIGHTS HOST`: behaves as a model server does towards its driver, without a model.

The model's name says what it does: `fails...` cannot load, `dies...` crashes at once, `stubborn...` ignores SIGTERM, all else serves,
and finishes at SIGTERM what it answers. The body of a POST names a file: the answer goes on until that is there.
"""

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def main() -> int:
    status_file, model, weights, host = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]

    def tell(state: str, **more: object) -> None:
        fresh = status_file.with_suffix(".new")
        fresh.write_text(json.dumps({"state": state, "pid": os.getpid(), **more}))
        fresh.replace(status_file)

    print("loading", model, flush=True)
    if model.startswith("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    tell("starting")
    if model.startswith("fails"):
        tell("failed", error="The model cannot be had; add it with `mini-studio models add`.")
        return 1
    if model.startswith("dies"):
        print("a traceback that says why", flush=True)
        return 3
    with Serving((host, 0), handler(model, weights)) as server:
        if not model.startswith("stubborn"):
            signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        tell("ready", port=server.server_port)
        server.serve_forever()
    return 0


class Serving(http.server.ThreadingHTTPServer):
    daemon_threads = False


def handler(model: str, weights: str) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"model": model, "weights": weights, "pid": os.getpid()}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            file = Path(self.rfile.read(int(self.headers["content-length"])).decode())
            self.send_response(200)
            self.end_headers()
            while not file.exists():
                self.wfile.write(b".")
                self.wfile.flush()
                time.sleep(0.02)
            self.wfile.write(b"end")

    return Handler


if __name__ == "__main__":
    sys.exit(main())
