"""A cluster whose pods serve: real control plane, real KEDA, real Prometheus, and a node whose pods are processes.

There is no kube-proxy here, so the gateway reaches Services through the API server's own proxy, which picks a ready pod as kube-proxy does.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.fakes.broker import free_port
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.running import Running

NAMESPACE = "mini-studio-models"
NODE = "processes"
KINDS = "deployments,replicasets,services,configmaps,poddisruptionbudgets,networkpolicies,scaledobjects,hpa,pods"
START_S = 60.0
SCALE_DOWN_S = 5
"""Silence before KEDA takes replicas away."""


@dataclass
class World:
    """The cluster and a studio that serves on it."""

    cluster: RealKubernetes
    studio: Running
    models: Path
    pods: Path
    """Folder of the pods' folders, with their logs."""
    gateway: str
    """Address of a gateway beside the API."""

    def objects(self, name: str) -> list[str]:
        """All that the cluster has of a deployment."""
        found = json.loads(self.cluster.kubectl("get", KINDS, "-n", NAMESPACE, "-o", "json"))["items"]
        return [f"{o['kind']}/{o['metadata']['name']}" for o in found if name in o["metadata"]["name"]]

    def running(self, name: str) -> int:
        """Ready pods that are not about to end."""
        return len(self._ready(name))

    def restarts(self, name: str) -> int:
        return sum(pod["status"]["containerStatuses"][0]["restartCount"] for pod in self._ready(name))

    def kill_server(self, name: str) -> None:
        """kill -9 of the model server of one pod."""
        address = self._ready(name)[0]["status"]["podIP"]
        lines = {
            p: (p / "cmdline").read_bytes()
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and (p / "cmdline").exists()
        }
        pids = [int(p.name) for p, line in lines.items() if f"--host={address}\0".encode() in line]
        assert len(pids) == 1
        os.kill(pids[0], 9)

    def _ready(self, name: str) -> list[dict]:  # type: ignore[type-arg]
        pods = self.cluster.get("pods", NAMESPACE)
        own = [p for p in pods if p["metadata"]["name"].startswith(name) and "deletionTimestamp" not in p["metadata"]]
        return [p for p in own if any(c["ready"] for c in p["status"].get("containerStatuses", ()))]


@contextlib.contextmanager
def program(
    command: list[str], log: Path, answers: Callable[[], object], environment: dict[str, str] | None = None
) -> Iterator[None]:
    """A process beside the test, from when it answers until the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    try:
        deadline = time.monotonic() + START_S
        while not _said(answers):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _said(answers: Callable[[], object]) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return bool(answers())
    return False


@contextlib.contextmanager
def addresses() -> Iterator[str]:
    """A range of addresses that processes of this machine can listen on, and nobody else's."""
    cidr = f"10.{random.randrange(200, 250)}.{random.randrange(256)}.0/24"
    subprocess.run(["ip", "route", "add", "local", cidr, "dev", "lo"], check=True)
    try:
        yield cidr
    finally:
        subprocess.run(["ip", "route", "del", "local", cidr, "dev", "lo"], check=True)


@contextlib.contextmanager
def api_proxy(cluster: RealKubernetes, folder: Path) -> Iterator[str]:
    """The API server over plain HTTP, as the cluster's administrator."""
    port = free_port()
    command = [*cluster.kubectl_command, "proxy", f"--port={port}"]
    with program(command, folder / "proxy.log", lambda: get(f"http://127.0.0.1:{port}/readyz")):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def node(cluster: RealKubernetes, proxy: str, folder: Path) -> Iterator[Path]:
    """The node; its pods' folders lie in the folder."""
    pods, log = folder / "pods", folder / "kubelet.log"
    with addresses() as cidr:
        command = [sys.executable, "-m", "tests.kubernetes.kubelet", proxy, NODE, cidr, str(pods)]
        with program(command, log, lambda: "the node is ready" in log.read_text()):
            cluster.kubectl("wait", f"node/{NODE}", "--for=condition=Ready", "--timeout=30s")
            yield pods


@contextlib.contextmanager
def gateway(studio: Running, port: int, folder: Path) -> Iterator[str]:
    """A gateway that is nothing else, on the studio's log."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mini_studio.cli", "gateway", "--data", str(studio.data)]
    with program(command, folder / "gateway.log", lambda: get(f"{url}/health"), {"MINI_STUDIO_API__PORT": str(port)}):
        yield url


@contextlib.contextmanager
def prometheus(targets: list[str], folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes the gateways each second."""
    binary = shutil.which("prometheus")
    assert binary, "needs Prometheus: apt-get install prometheus"
    scrape = {"job_name": "gateway", "static_configs": [{"targets": targets}]}
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]}
    (folder / "prometheus.json").write_text(json.dumps(config))  # which is YAML too
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        binary,
        f"--config.file={folder / 'prometheus.json'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address={url.removeprefix('http://')}",
    ]
    with program(command, folder / "prometheus.log", lambda: get(f"{url}/-/ready")):
        yield url


def get(url: str) -> bool:
    return httpx.get(url, trust_env=False, timeout=5).is_success


def settings(cluster: RealKubernetes, proxy: str, prometheus: str, models: Path) -> dict[str, str]:
    """The studio's, which serves on the cluster; the model servers are our own, since there is no GPU."""
    serving = {
        "NAMESPACE": NAMESPACE,
        "KUBECONFIG": str(cluster.kubeconfig),
        "RUNTIME": "studio",
        "CPU": "500m",
        "NODE_SELECTOR": json.dumps({"kubernetes.io/hostname": NODE}),
        "ENDPOINT": f"{proxy}/api/v1/namespaces/{{namespace}}/services/{{name}}:http/proxy",
        "PROMETHEUS": prometheus,
        "SCALE_POLL_S": "1",
        "SCALE_DOWN_S": str(SCALE_DOWN_S),
    }
    return {
        "MINI_STUDIO_MODELS_ROOT": str(models),
        "MINI_STUDIO_TRAINING__RAY_ADDRESS": "http://127.0.0.1:1",  # nobody trains here
        "MINI_STUDIO_SERVING__DRIVER": "kubernetes",
        "MINI_STUDIO_SERVING__READY_TIMEOUT_S": "60",  # no model sleeps before it had so long to become ready
        **{f"MINI_STUDIO_SERVING__KUBERNETES__{name}": value for name, value in serving.items()},
    }


def prepare(cluster: RealKubernetes) -> None:
    """What a cluster's administrator has made before the studio comes."""
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "mini-studio-models", "namespace": NAMESPACE},
        "spec": {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "100Gi"}}},
    }
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}, claim)
