"""What is checked before a start, the ports, the files of the run, the banner: no process is started."""

import re
import shutil
import socket
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mini_studio.embedded import __main__ as entry
from mini_studio.embedded import checks, ports, runfile, stack
from mini_studio.embedded.banner import banner_lines
from mini_studio.embedded.child import LOG_BYTES, rotate
from mini_studio.embedded.probe import Verdict, judge, probe
from mini_studio.examples import PORT_MAREN
from mini_studio.settings import Settings

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return checks.data_folder(tmp_path / "studio")


@pytest.fixture
def block() -> ports.PortBlock:
    return ports.claim(None)


def test_a_port_in_use_names_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(checks.CannotStart) as failure:
        checks.listen("127.0.0.1", taken.getsockname()[1])
    assert "in use" in str(failure.value)
    (other,) = re.findall(r"make run PORT=(\d+)", str(failure.value))
    assert ports.in_use("127.0.0.1", int(other)) is None


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 5_000_000))
    with pytest.raises(checks.CannotStart, match=r"5 MB are free.*make run DATA="):
        checks.data_folder(tmp_path / "studio")


def test_a_data_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(checks.CannotStart, match=r"can't be written.*make run DATA="):
        checks.data_folder(file)


def test_an_installation_without_what_runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(checks.CannotStart, match=r"no_such_package.*pip install 'mini-studio\[embedded\]'"):
        entry.run(tmp_path / "studio", 8000, None)
    assert not (tmp_path / "studio").exists()


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", ""])
def test_a_port_that_is_none(port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--data", str(tmp_path), f"--port={port}"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_stack_for_one_machine_is_no_production(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINI_STUDIO_PRODUCTION", "true")
    assert entry.main(["--data", str(tmp_path), "--port=8000"]) == 2
    assert "MINI_STUDIO_PRODUCTION is set" in capsys.readouterr().err


def test_two_studios_get_blocks_of_their_own(block: ports.PortBlock) -> None:
    other = ports.claim(block.base)
    assert other.base != block.base
    assert not {*range(other.base, other.workers[1] + 1)} & {*range(block.base, block.workers[1] + 1)}
    base = other.base
    other.release()
    again = ports.claim(base)
    assert again.base == base
    again.release()
    block.release()


def test_a_block_with_a_listener_in_it_is_left_alone(block: ports.PortBlock) -> None:
    base = block.base
    block.release()
    with socket.create_server(("127.0.0.1", base + 3)):
        other = ports.claim(base)
        assert other.base != base
        other.release()


def test_keys_are_made_once_and_private(data: Path) -> None:
    keys = runfile.s3_keys(data)
    assert runfile.s3_keys(data) == keys
    assert min(map(len, keys)) >= 20
    assert stat.S_IMODE((data / "run" / "s3-keys.json").stat().st_mode) == 0o600


def test_other_commands_read_the_addresses(data: Path, block: ports.PortBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    built = stack.build(data, "127.0.0.1", 8123, block, ("access", "secret"), data / "ray")
    runfile.write(data, built.content(1, block.base))
    monkeypatch.setenv("MINI_STUDIO_DATA", str(data))
    settings = Settings()
    assert settings.kafka.bootstrap == f"127.0.0.1:{block[stack.BROKER]}"
    assert settings.kafka.refill
    assert settings.s3.secret_key is not None
    assert settings.s3.secret_key.get_secret_value() == "secret"
    assert settings.api.port == 8123
    assert set(built.health) >= {"api", "ray", "broker", "s3", "relay", *stack.CONSUMERS}
    block.release()


def test_no_part_listens_beyond_this_machine_and_no_key_is_on_a_command_line(
    data: Path, block: ports.PortBlock
) -> None:
    built = stack.build(data, "127.0.0.1", 8123, block, ("access-key", "secret-key"), data / "ray")
    words = [word for part in built.parts for word in part.command]
    everywhere = "0.0.0.0"  # noqa: S104  # what must not be there
    assert not [word for word in words if everywhere in word or "secret-key" in word]
    block.release()


def test_the_run_decides_its_addresses_not_the_shell(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_STUDIO_API__PORT", "1")
    monkeypatch.setenv("MINI_STUDIO_LOG__LEVEL", "debug")
    environment = stack.environment(data, "run", {"api": {"port": 8000}})
    assert "MINI_STUDIO_API__PORT" not in environment
    assert environment["MINI_STUDIO_LOG__LEVEL"] == "debug"
    assert environment["RAY_AUTH_MODE"] == "disabled"


def test_large_logs_are_rotated(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    for content in "abcde":
        log.write_bytes(content.encode() * (LOG_BYTES + 1))
        rotate(log)
    kept = [path.read_text()[0] for path in sorted(tmp_path.iterdir())]
    assert kept == ["e", "d", "c"]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n{}", Verdict.HEALTHY),
        (b'HTTP/1.0 503 x\r\n\r\n{"status": "starting"}', Verdict.STARTING),
        (b'HTTP/1.0 503 x\r\n\r\n{"status": "unhealthy"}', Verdict.UNHEALTHY),
        (b"", Verdict.SILENT),
    ],
)
def test_health(answer: bytes, verdict: Verdict) -> None:
    assert judge(answer) is verdict


async def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert await probe(f"http://127.0.0.1:{port}/health") is Verdict.SILENT


def test_the_banner_is_four_lines_of_shell() -> None:
    lines = banner_lines("http://127.0.0.1:8000")
    assert len(lines) == 4
    for line in lines:
        subprocess.run(["bash", "-n", "-c", line], check=True)
    assert PORT_MAREN.exists()


def test_the_supervisor_loads_nothing_heavy() -> None:
    heavy = "{'pydantic', 'fastapi', 'aiokafka', 'ray', 'structlog', 'typer', 'httpx'}"
    program = f"import sys; import mini_studio.embedded.__main__; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
