"""`mini-studio run` hands over to a process that has loaded nothing but what it needs (see `__main__`)."""

import os
import sys
from pathlib import Path


def run_studio(data: Path, port: int) -> int:
    """Run the studio in `data`, its REST API on `port`, in the place of this process, which does not come back.

    It ends with 0 when it was asked to stop, and with 2 and one line on stderr when it can't start.
    """
    package = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([package, inherited] if inherited else [package])
    sys.stdout.flush()
    arguments = ["-m", "mini_studio.embedded", "--data", str(data), "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606
