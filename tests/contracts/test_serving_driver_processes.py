"""What only the local processes do: live on without their driver, restart, give up, keep inside the client's folder."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from events.types import DeploymentKind
from mini_studio.drivers.local_process import LocalProcessDriver, Start, serve_command
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.drivers.servers import LOG_BYTES, LOG_KEPT, Server
from mini_studio.errors import Refused, Unavailable
from mini_studio.settings import Serving
from tests.fakes.local_servers import all_servers, end_all, reconciled, stub_command

NAME = "vllm-ft-acme-tiny"
SPEC = ReleaseSpec(
    name=NAME,
    deployment_id="dep_" + "1" * 24,
    generation=1,
    kind=DeploymentKind.BASE,
    client_code="acme",
    model="tiny",
    base_model="tiny",
    weights_path=None,
    gpu_count=0,
    min_replicas=1,
    max_replicas=1,
    prometheus_threshold=5,
)


class Place:
    """A state folder and the drivers that come and go over it."""

    def __init__(self, root: Path) -> None:
        self.state_dir = root / "serving"
        self.models_root = root / "models"
        (self.models_root / "acme").mkdir(parents=True)

    def driver(
        self, *, max_restarts: int = 2, host: str = "127.0.0.1", command: Callable[[Start], list[str]] = stub_command
    ) -> LocalProcessDriver:
        settings = Serving(threads=1, max_restarts=max_restarts, host=host)
        return LocalProcessDriver(
            self.state_dir, self.models_root, settings, command=command, backoff_s=0.01, drain_s=0.1
        )

    def servers(self) -> list[int]:
        return all_servers(self.state_dir)

    def weights(self, folder: str = "acme/mine", text: str = "1") -> Path:
        path = self.models_root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "model.safetensors").write_text(text)
        return path


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    yield place
    await asyncio.to_thread(end_all, place.state_dir)


async def until(
    driver: LocalProcessDriver, spec: ReleaseSpec, wanted: Callable[[ReleaseReport], bool] | None = None
) -> ReleaseReport:
    """Reconcile until the report is as wanted; by default until it is ready or has failed."""
    return await reconciled(driver, spec, wanted or (lambda report: report.state is not ReleaseState.STARTING))


async def asked(report: ReleaseReport) -> dict[str, object]:
    async with httpx.AsyncClient(trust_env=False) as client:
        return dict((await client.get(report.endpoints[0] + "/health")).json())


async def test_a_killed_server_is_started_again(place: Place) -> None:
    driver = place.driver()
    first = await until(driver, SPEC)
    [pid] = place.servers()
    os.kill(pid, signal.SIGKILL)
    again = await until(driver, SPEC, lambda report: report.replicas == 1 and report.endpoints != first.endpoints)
    assert place.servers() != [pid]
    assert len(place.servers()) == 1
    assert again.state is ReleaseState.READY


async def test_servers_outlive_their_driver_and_are_adopted(place: Place) -> None:
    first = place.driver()
    before = await until(first, SPEC)
    await first.aclose()
    second = place.driver()
    assert await second.observe(NAME) == before
    assert await until(second, SPEC) == before
    await second.remove(NAME, SPEC.deployment_id, 1)
    assert place.servers() == []


async def test_a_server_whose_pid_was_never_written_down_is_adopted(place: Place) -> None:
    before = await until(place.driver(), SPEC)
    [record] = place.state_dir.rglob("*.proc.json")
    record.unlink()
    second = place.driver()
    assert (await until(second, SPEC)).endpoints == before.endpoints
    assert len(place.servers()) == 1


async def test_drivers_at_once_start_one_server(place: Place) -> None:
    drivers = [place.driver() for _ in range(4)]
    await asyncio.gather(*(driver.apply(SPEC) for driver in drivers for _ in range(3)))
    await until(drivers[0], SPEC)
    assert len(place.servers()) == 1


async def test_a_server_that_says_why_it_failed_is_not_restarted(place: Place) -> None:
    driver, spec = place.driver(), replace(SPEC, model="fails-to-load")
    report = await until(driver, spec)
    assert report.state is ReleaseState.FAILED
    assert "models add" in report.message
    await driver.apply(spec)
    assert place.servers() == []
    assert await driver.observe(NAME) == report


async def test_a_server_that_keeps_crashing_is_given_up_with_its_log(place: Place) -> None:
    driver, spec = place.driver(max_restarts=2), replace(SPEC, model="dies-at-once")
    report = await until(driver, spec)
    assert report.state is ReleaseState.FAILED
    assert "3 times in a row" in report.message
    assert "exit code 3" in report.message
    assert "a traceback that says why" in report.message
    [log] = place.state_dir.rglob("0.log")
    assert log.read_text().count("loading") == 3


async def test_a_new_generation_and_a_new_driver_try_a_failed_one_again(place: Place) -> None:
    driver, spec = place.driver(), replace(SPEC, model="dies-at-once")
    await until(driver, spec)
    [log] = place.state_dir.rglob("0.log")
    started = log.read_text().count("loading")
    await until(driver, replace(spec, generation=2))
    assert (again := log.read_text().count("loading")) > started
    await until(place.driver(), replace(spec, generation=2))
    assert log.read_text().count("loading") > again


async def test_the_same_content_in_a_new_generation_keeps_its_server(place: Place) -> None:
    driver = place.driver()
    before = await until(driver, SPEC)
    after = await until(driver, replace(SPEC, generation=2))
    assert (after.generation, after.endpoints) == (2, before.endpoints)


async def test_new_weights_roll(place: Place) -> None:
    driver = place.driver()
    spec = replace(SPEC, kind=DeploymentKind.FINE_TUNED, weights_path=place.weights())
    before = await until(driver, spec)
    place.weights(text="22")
    assert await until(driver, spec) == before  # not without a new generation
    after = await until(driver, replace(spec, generation=2))
    assert after.endpoints != before.endpoints
    await until(driver, replace(spec, generation=2), lambda _: len(place.servers()) == 1)


async def test_fewer_replicas_end_the_others(place: Place) -> None:
    driver = place.driver()
    await until(driver, replace(SPEC, min_replicas=3, max_replicas=3), lambda report: report.replicas == 3)
    left = await until(driver, replace(SPEC, generation=2), lambda _: len(place.servers()) == 1)
    assert left.replicas == 1


async def test_a_server_that_ignores_sigterm_is_killed(place: Place) -> None:
    driver, spec = place.driver(), replace(SPEC, model="stubborn")
    await until(driver, spec)
    await driver.remove(NAME, SPEC.deployment_id, 1)
    assert place.servers() == []
    assert not (place.state_dir / NAME).exists()


async def test_a_frozen_server_is_not_ready(place: Place) -> None:
    await until(place.driver(), SPEC)
    [pid] = place.servers()
    os.kill(pid, signal.SIGSTOP)
    report = await place.driver().observe(NAME)
    os.kill(pid, signal.SIGCONT)
    assert report is not None
    assert report.state is ReleaseState.STARTING


async def test_servers_inherit_the_environment(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_STUDIO_RUN_ID", "run-7")
    await until(place.driver(), SPEC)
    [pid] = place.servers()
    assert psutil.Process(pid).environ()["MINI_STUDIO_RUN_ID"] == "run-7"
    assert os.getsid(pid) == pid


async def test_it_says_what_it_does_otherwise_than_asked(place: Place) -> None:
    report = await until(place.driver(), replace(SPEC, gpu_count=2))
    assert "gpu_count 2 is ignored" in report.message


async def test_a_link_in_the_clients_folder_is_followed_once(place: Place) -> None:
    job = place.models_root / "acme" / "job"
    place.weights("acme/job/attempts/1")
    (job / "model").symlink_to("attempts/1")
    report = await until(place.driver(), replace(SPEC, weights_path=job / "model"))
    assert (await asked(report))["weights"] == str((job / "attempts" / "1").resolve())


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "../../etc",
        "other/theirs",
        "acme/../other/theirs",
        "acme/out",
        "acme/theirs",
        "acme",
        "acme/none",
        ".base",
    ],
)
async def test_weights_stay_in_the_clients_folder(place: Place, path: str) -> None:
    theirs = place.weights("other/theirs")
    (place.models_root / ".base").mkdir()
    (place.models_root / "acme" / "out").symlink_to("/etc")
    (place.models_root / "acme" / "theirs").symlink_to(theirs)
    for given in (Path(path), place.models_root / path):
        with pytest.raises(Refused, match="folder"):
            await place.driver().apply(replace(SPEC, weights_path=given))
    assert place.servers() == []


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", ".locks", "x" * 64, "a\n"])
async def test_a_bad_name_touches_nothing(place: Place, name: str) -> None:
    driver = place.driver()
    with pytest.raises(Refused):
        await driver.apply(replace(SPEC, name=name))
    with pytest.raises(Refused):
        await driver.remove(name, SPEC.deployment_id, 1)
    assert not place.state_dir.exists()


async def test_a_state_folder_that_cannot_be_written_is_an_outage(place: Place) -> None:
    place.state_dir.write_text("in the way")
    with pytest.raises(Unavailable, match="Make room or make it accessible"):
        await place.driver().apply(SPEC)


def test_a_log_is_cut_at_the_front(tmp_path: Path) -> None:
    server = Server(tmp_path, 0)
    server.log_file.write_bytes(b"line\n" * (LOG_BYTES // 5 + 10) + b"the end\n")
    server.bound_log()
    assert server.log_file.stat().st_size <= LOG_KEPT
    assert server.log_tail()[-1] == "the end"


async def test_servers_listen_on_the_address_that_gateways_are_told_and_on_no_other(place: Place) -> None:
    """As in compose.yaml, where the gateway is another machine."""
    ready = await until(place.driver(host="127.0.0.77"), SPEC)
    (endpoint,) = ready.endpoints
    assert endpoint.startswith("http://127.0.0.77:")
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{endpoint}/health")).is_success
        with pytest.raises(httpx.ConnectError):
            await client.get(endpoint.replace("127.0.0.77", "127.0.0.1"))


async def test_the_address_may_be_a_name(place: Place) -> None:
    ready = await until(place.driver(host="localhost"), SPEC)
    assert ready.endpoints[0].startswith("http://localhost:")


def test_the_command_names_weights_or_a_base_model(tmp_path: Path) -> None:
    start = Start("shown", "base", None, tmp_path, tmp_path / "status.json", "model-servers", 2, 300)
    assert serve_command(start)[1:] == [
        *(
            "-m",
            "workloads.serve",
            "--served-model-name",
            "shown",
            "--base-model",
            "base",
            "--models-root",
            str(tmp_path),
        ),
        *("--host", "model-servers", "--port", "0", "--status-file", str(tmp_path / "status.json"), "--threads", "2"),
        *("--finish-s", "300"),
    ]
    assert "--weights" in serve_command(replace(start, weights=tmp_path))


def test_a_driver_killed_between_any_two_lines_leaves_at_most_one_server(place: Place) -> None:
    """Forks drivers that are killed at the n-th line of an apply, then of a removal, and repairs after each (see the script)."""
    script = Path(__file__).parents[1] / "fakes" / "killed_driver.py"
    stride = os.environ.get("KILL_EVERY_LINES", "23")
    done = subprocess.run(
        [sys.executable, str(script), str(place.state_dir), str(place.models_root), stride],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=110 if stride == "23" else None,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
