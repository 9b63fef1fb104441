"""compose.yaml as Docker Compose sees it, read in two ways: here in Python for quick tests, and by Compose's own library in Go."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "compose.yaml"
STUDIO, SERVER, TRAINER = "mini-studio:0.1.0", "mini-studio-server:0.1.0", "mini-studio-trainer:0.1.0"

VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[?-])(?P<rest>[^}]*))?\}")


def required() -> set[str]:
    """Variables that have no default."""
    return {found["name"] for found in VARIABLE.finditer(FILE.read_text()) if found["kind"] == "?"}


def read_env(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines())


@dataclass(frozen=True)
class Service:
    name: str
    content: dict[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        return dict(self.content.get("environment") or {})

    @property
    def command(self) -> list[str]:
        return list(self.content.get("command") or [])

    @property
    def image(self) -> str:
        return str(self.content["image"])

    @property
    def is_studio(self) -> bool:
        """Whether it runs `mini-studio`, by the image's entrypoint or by its own."""
        return self.image == STUDIO or self.content.get("entrypoint") == ["mini-studio"]

    @cached_property
    def networks(self) -> set[str]:
        return set(self.content["networks"])


def load(variables: dict[str, str]) -> dict[str, Any]:
    """The file with its variables in place."""

    def value(found: re.Match[str]) -> str:
        given = variables.get(found["name"]) or (found["rest"] if found["kind"] == "-" else "")
        assert given, f"{found['name']} has no value"
        return given

    content: dict[str, Any] = yaml.safe_load(VARIABLE.sub(value, FILE.read_text()))
    return content


def services(variables: dict[str, str]) -> dict[str, Service]:
    return {name: Service(name, content) for name, content in load(variables)["services"].items()}


def load_as_compose_does(env_file: Path) -> subprocess.CompletedProcess[str]:
    """The project as Compose's own library loads it: JSON on stdout, or what is wrong on stderr."""
    loader = Path(__file__).parent / "compose_go"
    own = {name: value for name, value in os.environ.items() if not name.startswith("STUDIO_")}
    return subprocess.run(
        ["go", "run", ".", str(FILE), str(env_file)], cwd=loader, env=own, capture_output=True, text=True, check=False
    )


def services_of(project: str) -> dict[str, Service]:
    return {name: Service(name, content) for name, content in json.loads(project)["services"].items()}
