"""From REST 201 to a job's user code: `python -m benchmarks.job_start DATA [JOBS]`, against a running studio in DATA.

Baseline, in the same run: the same Ray head, asked directly for a job that only notes the time. Jobs go one after another;
the first one also pays for what a fresh Ray head has not started yet.
"""

import json
import statistics
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx

from mini_studio.settings import Settings
from workloads import specs

ROWS = b'{"prompt": "a", "completion": "b"}\n' * 4
CLIENT = "benchmark"
TARGET_S = 5.0
WAIT_S = 120.0


def ours(http: httpx.Client, models: Path, dataset: str) -> float:
    """Seconds from the answer to the trainer's first line."""
    body = {"client_code": CLIENT, "model": "tiny-llama", "dataset_filename": dataset, "n_epochs": 1}
    answer = http.post("/fine_tuning/submit-finetune", json=body)
    accepted = time.time()
    job = answer.raise_for_status().json()["job"]["id"]
    until(lambda: http.get(f"/fine_tuning/jobs/{job}").json()["job"]["status"] in ("succeeded", "failed", "cancelled"))
    said = specs.attempt_dir(models / CLIENT / job, 1) / specs.PROGRESS
    return float(json.loads(said.read_text().splitlines()[0])["time"]) - accepted


def bare(http: httpx.Client, ray: str, note: Path) -> float:
    """Seconds from Ray's answer to the first statement of a job without any of ours."""
    code = "import sys, time; open(sys.argv[1], 'w').write(str(time.time()))"
    name = f"bare-{uuid.uuid4().hex}"
    entrypoint = f"exec {sys.executable} -c {code!r} {note}"
    http.post(f"{ray}/api/jobs/", json={"entrypoint": entrypoint, "submission_id": name}).raise_for_status()
    accepted = time.time()
    until(note.exists)
    until(lambda: http.get(f"{ray}/api/jobs/{name}").json()["status"] not in ("PENDING", "RUNNING"))
    started = float(note.read_text())
    note.unlink()
    return started - accepted


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"nothing happened for {WAIT_S:g} s")
        time.sleep(0.05)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    settings = Settings(data=Path(sys.argv[1]))
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with httpx.Client(base_url=f"http://127.0.0.1:{settings.api.port}", timeout=60, trust_env=False) as http:
        sent = http.post(f"/fine_tuning/upload-dataset/{CLIENT}", files={"file": ("rows.jsonl", ROWS)})
        dataset = sent.raise_for_status().json()["dataset_id"]
        note = settings.data.resolve() / "run" / f"note-{uuid.uuid4().hex}"
        pairs = [
            (ours(http, settings.models, dataset), bare(http, settings.training.ray_address, note)) for _ in range(jobs)
        ]
    print(f"{'s after the 201':<18}{'studio':>8}{'bare Ray':>10}")
    for number, (studio, ray) in enumerate(pairs, 1):
        print(f"job {number:<14}{studio:>8.2f}{ray:>10.2f}")
    ratio = statistics.median(ray / studio for studio, ray in pairs)
    worst = max(studio for studio, _ in pairs)
    print(
        f"\nratio {ratio:.2f}; slowest {worst:.2f} s, target <= {TARGET_S:g} s: {'met' if worst <= TARGET_S else 'missed'}"
    )


if __name__ == "__main__":
    main()
