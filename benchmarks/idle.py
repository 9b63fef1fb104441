"""What a running studio costs when nobody asks anything: `python -m benchmarks.idle DATA [SECONDS]`.

Counts the studio's own processes (supervisor, guardian, broker, S3, API, relay, consumers); not Ray, not model servers.
Prints resident memory in MB (as the system counts it, shared pages in each process, and proportional) and CPU in % of one core.
"""

import json
import sys
import time
from pathlib import Path

import psutil

OWN = ("mini_studio.cli", "mini_studio.embedded", "tansu", "serve s3")


def own_processes(data: Path) -> dict[str, psutil.Process]:
    launcher = psutil.Process(json.loads((data / "run" / "studio.json").read_text())["pid"])
    found = {}
    for process in [launcher, *launcher.children(recursive=True)]:
        line = " ".join(process.cmdline())
        if any(word in line for word in OWN) and "ray" not in process.name():
            found[f"{process.pid} {line[-40:]}"] = process
    return found


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    data, seconds = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 15.0
    processes = own_processes(data)
    before = {name: cpu(process) for name, process in processes.items()}
    time.sleep(seconds)
    rows = []
    for name, process in processes.items():
        memory = process.memory_full_info()
        used = (cpu(process) - before[name]) / seconds * 100
        rows.append((memory.rss / 1e6, memory.pss / 1e6, used, name))
    print(f"{'RSS MB':>8} {'PSS MB':>8} {'CPU %':>7}")
    for rss, pss, used, name in sorted(rows, reverse=True):
        print(f"{rss:8.0f} {pss:8.0f} {used:7.1f}  {name}")
    rss, pss, used = (sum(row[n] for row in rows) for n in range(3))
    print(f"{rss:8.0f} {pss:8.0f} {used:7.1f}  in all")


if __name__ == "__main__":
    main()
