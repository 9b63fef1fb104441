"""A whole studio on one cluster, where each test has a deployment of its own; and the reconciler alone, in a namespace for each test."""

import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy
import pytest
import pytest_asyncio
from safetensors.numpy import load_file, save_file

from mini_studio.settings import Kubernetes
from tests.fakes import real_kubernetes
from tests.fakes.broker import free_port
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.running import Running
from tests.kubernetes.reconciling import Reconciled, reconciling
from tests.kubernetes.world import World, api_proxy, gateway, node, prepare, prometheus, settings


@pytest.fixture(scope="module")
def scaled_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealKubernetes]:
    """A real control plane with KEDA at work, which no other test should have scale its objects."""
    script = real_kubernetes.script()
    if script is None:
        pytest.skip(real_kubernetes.HOW_TO_STOP_IT)
    cluster = RealKubernetes.start(script, tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with tiny-llama, and with two fine-tunes of client `acme` that answer otherwise."""
    root = tmp_path_factory.mktemp("models")
    built = [sys.executable, "-m", "workloads.base_models", "add", "tiny-llama", "--models-root", str(root)]
    subprocess.run(built, check=True, stdout=subprocess.DEVNULL)
    for shift, name in enumerate(("one", "two"), 1):
        own = root / "acme" / name
        shutil.copytree(root / ".base" / "tiny-llama", own)
        weights = load_file(own / "model.safetensors")
        embedding = "model.embed_tokens.weight"
        weights[embedding] = numpy.roll(weights[embedding], shift, axis=0)
        save_file(weights, own / "model.safetensors", {"format": "pt"})
    return root


@pytest.fixture(scope="module")
def world(scaled_cluster: RealKubernetes, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, port, beside = tmp_path_factory.mktemp("world"), free_port(), free_port()
    with ExitStack() as stack:
        proxy = stack.enter_context(api_proxy(scaled_cluster, folder))
        pods = stack.enter_context(node(scaled_cluster, proxy, folder))
        scraper = stack.enter_context(prometheus([f"127.0.0.1:{port}", f"127.0.0.1:{beside}"], folder))
        prepare(scaled_cluster)
        studio = Running(folder / "studio", port, settings(scaled_cluster, proxy, scraper, models))
        studio.start()
        stack.callback(studio.stop)
        yield World(scaled_cluster, studio, models, pods, stack.enter_context(gateway(studio, beside, folder)))


@pytest.fixture
def namespace(real_cluster: RealKubernetes) -> Iterator[str]:
    with real_cluster.namespace() as name:
        yield name


@pytest_asyncio.fixture
async def reconciled(real_cluster: RealKubernetes, namespace: str, tmp_path: Path) -> AsyncIterator[Reconciled]:
    kubernetes = Kubernetes(
        namespace=namespace, kubeconfig=real_cluster.kubeconfig, runtime="studio", request_timeout_s=3
    )
    async with reconciling(real_cluster, tmp_path, kubernetes) as found:
        yield found
