"""A studio of stubs under the real supervisor: `stub_studio.py DATA`."""

import asyncio
import os
import secrets
import sys
from pathlib import Path

from mini_studio.embedded import checks, ports, runfile, stack
from mini_studio.embedded.child import Part
from mini_studio.embedded.guardian import Guardian
from mini_studio.embedded.supervisor import Supervisor

STUB = str(Path(__file__).with_name("stub_part.py"))


def part(name: str, port: int, *options: str, **more: bool) -> Part:
    return Part(
        name, [sys.executable, STUB, name, str(port), *options], health=f"http://127.0.0.1:{port}/health", **more
    )


def main() -> None:
    data = checks.data_folder(Path(sys.argv[1]))
    try:
        checks.hold(data)
    except checks.CannotStart as error:
        sys.exit(str(error))
    checks.end_leftovers(data)
    block = ports.claim(None)
    ray_folder = data / "temporary"
    ray_folder.mkdir(exist_ok=True)
    parts = [
        part("broker", block[0], after_preparation=False, needed_to_prepare=True, forgets=True, stopped_first=False),
        part("ray", block[1], "stubborn", "parent", after_preparation=False, stopped_first=False),
        part("api", block[2], prepared_once=True),
    ]
    built = stack.Stack(parts, "http://127.0.0.1:1", {}, {})
    run_id = secrets.token_hex(8)
    environment = stack.environment(data, run_id, {})
    runfile.write(data, built.content(os.getpid(), block.base))
    program = "import pathlib, sys; d = pathlib.Path(sys.argv[1]); (d / 'broken').exists() and sys.exit(1); "
    program += "(d / 'prepared').open('a').write('x')"
    prepare = [sys.executable, "-c", program, str(data)]
    guardian = Guardian(run_id, [ray_folder], dict(os.environ))
    sys.exit(asyncio.run(Supervisor(built, data, run_id, environment, guardian, prepare=prepare).run()))


main()
