"""The supervisor with stub parts: small programs that need neither a broker nor Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from mini_studio.embedded.marks import RUN_DATA, Family
from tests.fakes.broker import free_port

STUDIO = Path(__file__).with_name("stub_studio.py")
ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


class Run:
    """A studio of stubs in a process of its own."""

    def __init__(self, data: Path, *more: str) -> None:
        self.data = data
        self.output = data.with_suffix(".out")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(STUDIO), str(data), *more],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def said(self) -> str:
        return self.output.read_text()

    def pids(self) -> dict[str, int]:
        """Of the stubs, as each wrote it."""
        return {path.stem: int(path.read_text() or 0) for path in (self.data / "pids").glob("*.pid")}


Seen = TypeVar("Seen")


def until(look: Callable[[], Seen]) -> Seen:
    limit = time.monotonic() + PATIENCE_S
    while not (seen := look()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)
    return seen


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "studio"
    yield folder
    Family({RUN_DATA: str(folder)}).end(quiet_s=0.5, limit_s=30)


@pytest.fixture
def run(data: Path) -> Iterator[Run]:
    """A healthy one."""
    studio = Run(data)
    until(lambda: "is running at" in studio.said())
    yield studio
    if studio.process.poll() is None:
        studio.process.kill()
        studio.process.wait()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_everything(run: Run, signum: int) -> None:
    pids = run.pids()
    assert set(pids) == {"broker", "ray", "ray-orphan", "api"}
    os.killpg(run.process.pid, signum)
    assert run.process.wait(PATIENCE_S) == 0, run.said()
    assert not [name for name, pid in pids.items() if alive(pid)]
    assert not Family({RUN_DATA: str(run.data)}).members()
    assert "Traceback" not in run.said()


def test_after_kill_9_nothing_is_left_and_the_next_run_works(run: Run, data: Path) -> None:
    pids = run.pids()
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    until(lambda: not [pid for pid in pids.values() if alive(pid)])
    until(lambda: not (data / "temporary").exists())
    following = Run(data)
    until(lambda: following.said().count("is running at") == 2)
    following.process.terminate()
    assert following.process.wait(PATIENCE_S) == 0


def test_a_dead_guardian_is_replaced(run: Run, data: Path) -> None:
    def guardians() -> list[int]:
        children = psutil.Process(run.process.pid).children()
        return [child.pid for child in children if alive(child.pid) and "guardian" in " ".join(child.cmdline())]

    (first,) = guardians()
    os.kill(first, signal.SIGKILL)
    until(lambda: [pid for pid in guardians() if pid != first])
    pids = run.pids()
    run.process.kill()
    run.process.wait()
    until(lambda: not [pid for pid in pids.values() if alive(pid)])


def test_leftovers_of_a_run_without_a_guardian_are_ended(data: Path) -> None:
    environment = {**os.environ, RUN_DATA: str(data)}
    left = subprocess.Popen(["sleep", "1000"], env=environment, start_new_session=True)
    studio = Run(data)
    assert left.wait(PATIENCE_S) == -signal.SIGKILL
    until(lambda: "is running at" in studio.said())
    studio.process.terminate()
    assert studio.process.wait(PATIENCE_S) == 0


def test_a_dead_part_is_started_again(run: Run) -> None:
    first = run.pids()["api"]
    os.kill(first, signal.SIGKILL)
    until(lambda: run.pids()["api"] != first)
    assert "api: killed by SIGKILL" in run.said()


def test_a_part_that_says_it_is_unhealthy_is_started_again_at_once(run: Run, data: Path) -> None:
    first, began = run.pids()["api"], time.monotonic()
    (data / "api.ill").touch()
    until(lambda: run.pids()["api"] != first)
    assert time.monotonic() - began < 30
    assert "api: says it is unhealthy, ending it" in run.said()


def test_a_part_that_ends_as_asked_is_started_again_without_a_pause(run: Run) -> None:
    first = run.pids()["api"]
    os.kill(first, signal.SIGTERM)
    until(lambda: run.pids()["api"] != first)
    assert "starting it again in" not in run.said()


def test_a_new_broker_is_prepared_again(run: Run, data: Path) -> None:
    assert (data / "prepared").read_text() == "x"
    os.kill(run.pids()["broker"], signal.SIGKILL)
    until(lambda: (data / "prepared").read_text() == "xx")


def test_the_api_is_started_again_while_there_is_no_broker_to_speak_of(run: Run, data: Path) -> None:
    (data / "broken").touch()
    pids = run.pids()
    os.kill(pids["broker"], signal.SIGKILL)
    until(lambda: "prepare: failed" in run.said())
    os.kill(pids["api"], signal.SIGKILL)
    until(lambda: run.pids()["api"] != pids["api"])
    assert (data / "prepared").read_text() == "x"


def test_one_studio_to_a_data_folder(run: Run, data: Path) -> None:
    command = [sys.executable, "-m", "mini_studio.embedded", "--data", str(data), "--port", str(free_port())]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert f"process {run.process.pid}" in second.stderr
    assert "make run DATA=" in second.stderr


def test_the_run_file_is_private_and_names_the_process(run: Run, data: Path) -> None:
    file = data / "run" / "studio.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["pid"] == run.process.pid
