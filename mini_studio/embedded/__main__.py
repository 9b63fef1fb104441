"""The embedded studio in the foreground: `python -m mini_studio.embedded --data DIR --port N`."""

import argparse
import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mini_studio.embedded import checks, ports, runfile, stack
from mini_studio.embedded.guardian import Guardian
from mini_studio.embedded.supervisor import Supervisor

REFUSED = 2
LONGEST_TEMPORARY = 24
"""Ray puts Unix sockets under its folder, whose paths may have 107 characters."""


def main(arguments: list[str] | None = None) -> int:
    """0: stopped as asked. 2: can't start; one line on stderr says what to do."""
    parser = argparse.ArgumentParser(prog="mini_studio.embedded", description="The whole studio on this machine.")
    parser.add_argument("--data", type=Path, default=Path(".studio"), help="the studio's data folder")
    parser.add_argument("--port", default="8000", help="port of the REST API")
    parser.add_argument("--with-parent", action="store_true", help="stop when the parent process is gone")
    options = parser.parse_args(arguments)
    parent = os.getppid() if options.with_parent else None
    try:
        return run(options.data, _port(options.port), parent)
    except (checks.CannotStart, FileNotFoundError) as error:
        print(f"mini-studio: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 0


def run(data: Path, port: int, parent: int | None) -> int:
    """Check, then supervise until asked to stop."""
    checks.not_in_production()
    host = os.environ.get("MINI_STUDIO_API__HOST") or stack.LOCAL
    checks.packages()
    data = checks.data_folder(data)
    lock = checks.hold(data)
    earlier = runfile.read(data)
    checks.end_leftovers(data)
    listener = checks.listen(host, port)
    try:
        block = ports.claim(earlier.get("ports"), avoid=[port])
    except OSError as error:
        raise checks.CannotStart(f"{error}: stop another studio first") from None
    run_id = secrets.token_hex(8)
    with _ray_folder(data) as ray_folder:
        built = stack.build(data, host, port, block, runfile.s3_keys(data), ray_folder, listener.fileno())
        environment = stack.environment(data, run_id, built.settings)
        # unmarked: it has to outlive everything that is marked
        guardian = Guardian(run_id, [ray_folder], {**os.environ, "PYTHONPATH": environment["PYTHONPATH"]})
        runfile.write(data, built.content(os.getpid(), block.base))
        supervisor = Supervisor(built, data, run_id, environment, guardian, parent)
        code = asyncio.run(supervisor.run())
        runfile.write(data, built.content(None, block.base))
    listener.close()
    block.release()
    os.close(lock)
    return code


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise checks.CannotStart(f"PORT has to be a number from 1 to 65535, not {text!r}: make run PORT=8000")
    return int(text)


@contextlib.contextmanager
def _ray_folder(data: Path) -> Iterator[Path]:
    """A short temporary folder; the one that a killed run left is removed first."""
    note = runfile.folder(data) / "ray-folder"
    with contextlib.suppress(OSError):
        left = Path(note.read_text())
        if left.name.startswith("ms-") and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    root = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ms-", dir=root if len(root) <= LONGEST_TEMPORARY else "/tmp"))  # noqa: S108
    note.write_text(str(folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        note.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
