"""Apply to ready of many deployments on a Kubernetes control plane: `python -m benchmarks.kubernetes_apply KUBECONFIG [--deployments N]`.

KUBECONFIG is of an administrator of a test cluster with KEDA's definitions (`docs/benchmarks.md` says how one is started here), whose pods
become ready at once, so what is measured is the control plane's work and ours. In a namespace of its own:

- baseline: `kubectl apply --server-side` of the same objects, all in one call, until every Deployment is available;
- ours: the releases of N deploy requests, from the first look of the reconciler until every record says ready;
- watch lag: from a change by another client to the reconciler being woken by it.

Prints deployments a second and their ratio, the driver's requests a deployment, and the growth of this process's memory.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from consumers.watchers import serving
from events.types import DeploymentStatus
from mini_studio import logs
from mini_studio.drivers.kubernetes.api import CONFIG_MAP
from mini_studio.drivers.kubernetes.manifests import LABELS
from mini_studio.settings import Kubernetes, Log
from tests.fakes.real_kubernetes import RealKubernetes
from tests.kubernetes.reconciling import Reconciled, reconciling

LOOKS = 50


async def ours(reconciled: Reconciled, deployments: int) -> tuple[float, int, list[str]]:
    """Seconds until all are ready, requests sent, and their ids."""
    assert await reconciled.driver.observe("none") is None  # from here on the cluster is watched
    calls, begun = reconciled.driver.api.calls, time.perf_counter()
    ids = [await reconciled.deploy() for _ in range(deployments)]
    for id in ids:
        await reconciled.becomes(id, DeploymentStatus.READY, 600)
    return time.perf_counter() - begun, reconciled.driver.api.calls - calls, ids


async def by_kubectl(reconciled: Reconciled, ids: list[str]) -> float:
    """Seconds in which kubectl has the same objects, under other names, applied and available."""
    objects: list[dict[str, Any]] = []
    for id in ids:
        spec = serving.spec(await reconciled.release(id))
        for _, manifest in await reconciled.driver.wanted(spec):
            objects.append(json.loads(json.dumps(manifest).replace(spec.name, f"base-{id[-12:]}")))
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    begun = time.perf_counter()
    await asyncio.to_thread(reconciled.kubectl, "apply", "--server-side", "-f", "-", given=listed)
    wait = ("wait", "--for=condition=Available", "--timeout=600s", "deployments", "--all")
    await asyncio.to_thread(reconciled.kubectl, *wait)
    return time.perf_counter() - begun


async def lag(reconciled: Reconciled) -> list[float]:
    """Milliseconds from the answer to a write to the change having come by the watch."""
    mirror, took = reconciled.driver.mirrors[CONFIG_MAP], []
    for look in range(LOOKS):
        metadata = {"name": f"look-{look}", "labels": LABELS}
        await reconciled.driver.api.apply(
            CONFIG_MAP, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}, force=True
        )
        begun = time.perf_counter()
        while mirror.get(f"look-{look}") is None:
            await asyncio.sleep(0.0005)
        took.append((time.perf_counter() - begun) * 1000)
    return sorted(took)


async def main(kubeconfig: Path, deployments: int) -> None:
    cluster, process = RealKubernetes(kubeconfig), psutil.Process()
    with cluster.namespace() as namespace, tempfile.TemporaryDirectory() as data:
        kubernetes = Kubernetes(namespace=namespace, kubeconfig=kubeconfig, runtime="studio", cpu="10m", memory="64Mi")
        async with reconciling(cluster, Path(data), kubernetes) as reconciled:
            await ours(reconciled, 1)
            before = process.memory_info().rss
            seconds, calls, ids = await ours(reconciled, deployments)
            grown = process.memory_info().rss - before
            base = await by_kubectl(reconciled, ids)
            lags = await lag(reconciled)
            cpu = sum(process.cpu_times()[:2])
            await asyncio.sleep(10)
            busy = (sum(process.cpu_times()[:2]) - cpu) / 10
    print(f"kubectl apply, then wait: {deployments / base:.1f} deployments/s")
    print(f"ours, from request to ready: {deployments / seconds:.1f} deployments/s = {base / seconds:.2f}x")
    print(
        f"requests a deployment: {calls / deployments:.1f}; while all are ready the reconciler takes {busy:.1%} of a core"
    )
    print(f"memory of this process: +{grown / 2**20:.1f} MiB, {grown / deployments / 1024:.0f} KiB a deployment")
    print(f"watch lag: p50 {statistics.median(lags):.1f} ms, p99 {lags[int(len(lags) * 0.99)]:.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kubernetes_apply", description=__doc__)
    parser.add_argument("kubeconfig", type=Path)
    parser.add_argument("--deployments", type=int, default=100)
    options = parser.parse_args()
    logs.configure(Log(level="warning"), "benchmark")
    asyncio.run(main(options.kubeconfig, options.deployments))
