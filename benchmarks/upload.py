"""An upload against a raw copy: `python -m benchmarks.upload DATA [MEGABYTES]`, against a running studio in DATA.

Baseline, in the same run: the same bytes over a loopback socket into a file, with SHA-256, by a process of its own.
Both end on the disk (fsync). Prints both rates, their ratio, and how much the API's resident memory grew, at its most and at the end.

For another S3 than the embedded one start the studio with its address, and keys that may create the bucket:
`MINI_STUDIO_S3__ENDPOINT=http://127.0.0.1:9000 MINI_STUDIO_S3__ACCESS_KEY=... MINI_STUDIO_S3__SECRET_KEY=... make run`.
"""

import hashlib
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

ROUNDS = 5
PAUSE_S = 10.0
"""Consumer `datasets` reads the round before back, and should be done."""
ROW = (
    json.dumps({"prompt": "What is the word of the day? " * 8, "completion": "It is a quiet word. " * 12}).encode()
    + b"\n"
)
BLOCK = ROW * (1024 * 1024 // len(ROW))
BOUNDARY = b"benchmark-boundary"
HEAD = (
    b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n"
)
TAIL = b"\r\n--" + BOUNDARY + b"--\r\n"


def receive(port: int, path: str) -> None:
    digest = hashlib.sha256()
    with socket.create_connection(("127.0.0.1", port)) as connection, Path(path).open("wb") as file:
        while chunk := connection.recv(256 * 1024):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())  # an upload is on the disk when it is answered


def raw_copy(blocks: int) -> float:
    """Seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        reader = multiprocessing.Process(target=receive, args=(server.getsockname()[1], file.name))
        reader.start()
        connection, _ = server.accept()
        started = time.perf_counter()
        for _ in range(blocks):
            connection.sendall(BLOCK)
        connection.close()
        reader.join()
        return time.perf_counter() - started


def upload(url: str, blocks: int) -> float:
    """Seconds, from the first byte to the 201."""

    def body() -> Iterator[bytes]:
        yield HEAD
        for _ in range(blocks):
            yield BLOCK
        yield TAIL

    length = len(HEAD) + blocks * len(BLOCK) + len(TAIL)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}", "Content-Length": str(length)}
    request = urllib.request.Request(url + "/fine_tuning/upload-dataset/benchmark", data=body(), headers=headers)  # noqa: S310
    started = time.perf_counter()
    with urllib.request.urlopen(request) as response:  # noqa: S310
        assert json.load(response)["size_bytes"] == blocks * len(BLOCK)
    return time.perf_counter() - started


def api_process(data: Path) -> psutil.Process:
    launcher = psutil.Process(json.loads((data / "run" / "studio.json").read_text())["pid"])
    return next(p for p in launcher.children() if p.cmdline()[-1:] == ["api"])


class Peak:
    """The most resident memory that a process had, looked at twenty times a second."""

    def __init__(self, process: psutil.Process) -> None:
        self.bytes = 0
        self._process = process
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            time.sleep(0.05)


def main() -> None:
    data, megabytes = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1024
    running = json.loads((data / "run" / "studio.json").read_text())
    url = running["url"]
    print(f"S3 at {running['settings']['s3']['endpoint']}")
    blocks = megabytes * 1024 * 1024 // len(BLOCK)
    size = blocks * len(BLOCK) / 1e6
    api = api_process(data)
    upload(url, 20)
    before, peak = api.memory_info().rss, Peak(api)
    ratios = []
    for _ in range(ROUNDS):
        time.sleep(PAUSE_S)
        os.sync()
        raw = raw_copy(blocks)
        os.sync()
        seconds = upload(url, blocks)
        ratios.append(raw / seconds)
        print(
            f"{size:.0f} MB: raw copy {size / raw:.0f} MB/s, upload {size / seconds:.0f} MB/s, ratio {ratios[-1]:.2f}"
        )
    grown = (api.memory_info().rss - before) / 1e6
    most = (peak.bytes - before) / 1e6
    print(
        f"median ratio {statistics.median(ratios):.2f}; the API grew by {most:.0f} MB at most, {grown:.0f} MB at the end"
    )


if __name__ == "__main__":
    main()
