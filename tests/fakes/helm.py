"""The Helm client: the binary that `MINI_STUDIO_TEST_HELM` names, or the one that the script `helm` of `MINI_STUDIO_TEST_REAL` makes."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.real_services import SCRIPTS

BINARY = "MINI_STUDIO_TEST_HELM"
HOW = f"needs the Helm client: run `make test-real`, or set {BINARY} to it"
KUBERNETES = "1.36"
CHART = Path(__file__).parents[2] / "helm" / "mini-studio"
VALUES = Path(__file__).parents[1] / "install" / "values"


@dataclass
class Helm:
    """`kubeconfig` names the cluster of the commands that need one."""

    binary: str
    kubeconfig: Path | None = None

    @classmethod
    def found(cls) -> "Helm":
        """Skips where there is none."""
        if given := os.environ.get(BINARY):
            return cls(given)
        if not (folder := os.environ.get(SCRIPTS)):
            pytest.skip(HOW)
        script = Path(folder).resolve() / "helm"
        made = subprocess.run([str(script), "install"], check=True, stdout=subprocess.PIPE, text=True)
        return cls(made.stdout.split()[-1])

    def run(self, *arguments: str) -> str:
        """What it prints. Raises `CalledProcessError`, whose `stderr` says why."""
        cluster = {} if self.kubeconfig is None else {"KUBECONFIG": str(self.kubeconfig)}
        command = [self.binary, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **cluster})
        return done.stdout

    def render(self, *values: str, sets: Sequence[str] = (), namespace: str = "studio") -> list[dict[str, Any]]:
        """The objects of the chart with these files of `tests/install/values`, hooks included."""
        command = ["template", "mini-studio", str(CHART), "--kube-version", KUBERNETES, "--namespace", namespace]
        return [found for found in yaml.safe_load_all(self.run(*command, *options(values, sets))) if found]


def options(values: Sequence[str], sets: Sequence[str] = ()) -> list[str]:
    files = [part for name in values for part in ("--values", str(VALUES / f"{name}.yaml"))]
    return files + [part for text in sets for part in ("--set", text)]
