"""A whole studio as processes under its real launcher, and a client for it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S = 120
ROWS = [{"prompt": f"What is the word of {name}? ", "completion": word} for name, word in (
    ("Anna", "apple"), ("Bruno", "river"), ("Clara", "stone"), ("David", "music"), ("Elena", "cloud"), ("Felix", "tiger"),
)]  # fmt: skip


@dataclass
class Running:
    """A studio as a process, and a client for it."""

    data: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    """Beside this process's own: settings, and addresses of parts that run elsewhere."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.data.parent / "launcher.log"

    def start(self) -> None:
        command = [sys.executable, "-m", "mini_studio.embedded", "--data", str(self.data), "--port", str(self.port)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self.until(lambda: "is running at" in self.log.read_text(), START_S)

    def stop(self, signum: int = signal.SIGTERM) -> None:
        assert self.process is not None
        self.process.send_signal(signum)
        self.process.wait(30)
        self.log.unlink()

    def call(self, method: str, path: str, status: int | None = None, **options: Any) -> Any:
        response = httpx.request(method, self.url + path, timeout=60, trust_env=False, **options)
        assert status is None or response.status_code == status, response.text
        return response.json()

    def upload(self, client: str, rows: list[Any] = ROWS) -> Any:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        return self.call("POST", f"/fine_tuning/upload-dataset/{client}", 201, files={"file": ("rows.jsonl", content)})

    def submit(self, client: str, dataset: str, **fields: Any) -> Any:
        body = {"model": "tiny-llama", "client_code": client, "dataset_filename": dataset, **fields}
        return self.call("POST", "/fine_tuning/submit-finetune", 201, json=body)["job"]

    def finished(self, job: str, seconds: float = 120) -> Any:
        self.until(lambda: self.job(job)["status"] in ("succeeded", "failed", "cancelled"), seconds)
        return self.job(job)

    def job(self, id: str) -> Any:
        return self.call("GET", f"/fine_tuning/jobs/{id}", 200)["job"]

    def infer(self, model: str, body: Any, client: str | None = None) -> httpx.Response:
        headers = {"X-User-ID": client} if client else {}
        return httpx.post(
            f"{self.url}/inference/infer/{model}", json=body, headers=headers, timeout=60, trust_env=False
        )

    @property
    def bootstrap(self) -> str:
        return str(self.run_file["settings"]["kafka"]["bootstrap"])

    @property
    def run_file(self) -> Any:
        return json.loads((self.data / "run" / "studio.json").read_text())

    def get(self, url: str) -> httpx.Response:
        return httpx.get(url, timeout=10, trust_env=False)

    def children(self, *words: str) -> list[int]:
        """Processes of this studio whose command line has all `words`."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    marked = f"MINI_STUDIO_RUN_DATA={self.data}".encode() in (entry / "environ").read_bytes()
                except OSError:
                    continue
                if marked and all(word in line for word in words):
                    found.append(int(entry.name))
        return found

    def kill(self, *words: str) -> None:
        pids = self.children(*words)
        assert pids, f"no process {words}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    @staticmethod
    def until(condition: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except (OSError, httpx.HTTPError):
                pass
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.2)
