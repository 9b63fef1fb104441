"""A real Kubernetes control plane for tests: at the kubeconfig given, or started by the script of a folder given.

`MINI_STUDIO_TEST_KUBECONFIG=FILE` names a running cluster with KEDA, of an administrator. `MINI_STUDIO_TEST_REAL=DIR`, which
`make test-real` sets, names a folder with a script `kubernetes`: `install`, `install-keda`, `start DATA PORT`, `keda DATA`, `stop DATA`,
`kill DATA [COMPONENT ...]`, `pause DATA`, `resume DATA`. It simulates the kubelets: pods are ready at once.
"""

import json
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.broker import lasting_port
from tests.fakes.real_services import SCRIPTS, script_of

KUBECONFIG = "MINI_STUDIO_TEST_KUBECONFIG"
HOW = f"needs a real Kubernetes: run `make test-real`, or set {KUBECONFIG}=FILE"
HOW_TO_STOP_IT = f"kills and pauses a real Kubernetes: run `make test-real`, or set {SCRIPTS} to a folder with the script `kubernetes`"
PORTS = 6
"""The script uses so many ports from the first one on."""


def script() -> Path | None:
    """The script that starts and stops a control plane, if there is one."""
    return script_of("kubernetes")


@dataclass
class RealKubernetes:
    """A cluster, as its administrator sees it. `data` is None for one that runs anyway."""

    kubeconfig: Path
    script: Path | None = None
    data: Path | None = None
    port: int = 0

    @classmethod
    def start(cls, script: Path, data: Path, environment: Mapping[str, str] | None = None) -> "RealKubernetes":
        """With KEDA. `environment` is the script's, such as `KUBE_REAL_CRDS`. Builds both the first time, which takes ten minutes."""
        for part in ("install", "install-keda"):
            subprocess.run([str(script), part], check=True, stdout=subprocess.DEVNULL)
        started = cls(data / "kubeconfig", script, data, lasting_port(PORTS))
        started.call("start", str(started.port), environment=environment)
        started.call("keda")
        return started

    def start_again(self) -> None:
        self.call("start", str(self.port))

    def stop(self) -> None:
        self.call("stop")

    def kill(self, *components: str) -> None:
        self.call("kill", *components)

    def pause(self, *components: str) -> None:
        self.call("pause", *components)

    def resume(self, *components: str) -> None:
        self.call("resume", *components)

    def call(self, verb: str, *rest: str, environment: Mapping[str, str] | None = None) -> None:
        assert self.script is not None, HOW_TO_STOP_IT
        assert self.data is not None
        command = [str(self.script), verb, str(self.data), *rest]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})})

    @property
    def kubectl_command(self) -> list[str]:
        binary = "kubectl" if self.script is None else str(_installed() / "bin" / "kubectl")
        return [binary, "--kubeconfig", str(self.kubeconfig)]

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        """What kubectl prints. Raises `CalledProcessError`, whose `stderr` says why."""
        command = [*self.kubectl_command, *arguments]
        return subprocess.run(command, check=True, input=given, capture_output=True, text=True).stdout

    def apply(self, *manifests: dict[str, Any]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--server-side", "--field-manager=test", "-f", "-", given=json.dumps(listed))

    def get(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "-n", namespace, "-o", "json"))["items"]
        return items

    @contextmanager
    def namespace(self) -> Iterator[str]:
        """A new namespace, deleted afterwards; that goes on in the background."""
        name = f"test-{uuid.uuid4().hex[:10]}"
        self.kubectl("create", "namespace", name)
        try:
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")


def _installed() -> Path:
    default = Path(os.environ.get("MINI_STUDIO_REAL", Path.home() / ".cache" / "mini-studio-real")) / "kubernetes"
    return Path(os.environ.get("KUBE_REAL_DIR", default))
