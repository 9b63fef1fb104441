"""`python -m tests.fakes.trainer SPEC`: trains nothing. Waits until `<SPEC>.exit` holds its exit code; tells `<SPEC>.seen` what it saw."""

import json
import os
import sys
import time
from pathlib import Path


def main() -> int:
    spec = sys.argv[1]
    seen = {"pid": os.getpid(), "python": sys.executable, "threads": os.environ.get("OMP_NUM_THREADS")}
    seen["ray_token"] = os.environ.get("RAY_AUTH_TOKEN")
    with Path(spec + ".seen").open("a") as file:
        file.write(json.dumps(seen) + "\n")
    for line in json.loads(Path(spec).read_text()).get("say", []):
        print(line, flush=True)
    end = Path(spec + ".exit")
    give_up = time.monotonic() + 120
    while not (end.exists() and end.read_text()) and time.monotonic() < give_up:
        time.sleep(0.05)
    return int(end.read_text())


if __name__ == "__main__":
    sys.exit(main())
