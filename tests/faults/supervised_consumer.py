"""One consumer under the real supervisor: `supervised_consumer DATA HEALTH_PORT`."""

import asyncio
import os
import secrets
import sys
from pathlib import Path

from mini_studio.embedded import checks, stack
from mini_studio.embedded.child import Part
from mini_studio.embedded.guardian import Guardian
from mini_studio.embedded.supervisor import Supervisor


def main(data: Path, port: str) -> int:
    checks.data_folder(data)
    program = [sys.executable, "-m", "tests.faults.blockable_consumer", port]
    part = Part("jobs", program, health=f"http://127.0.0.1:{port}/health")
    built = stack.Stack([part], "", {}, {})
    run_id = secrets.token_hex(8)
    environment = stack.environment(data, run_id, {})
    guardian = Guardian(run_id, [], dict(os.environ))
    prepare = [sys.executable, "-c", "pass"]
    return asyncio.run(Supervisor(built, data, run_id, environment, guardian, prepare=prepare).run())


sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
