"""The serving reconciler on a real control plane: real records, real objects; simulated kubelets make pods ready at once."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from consumers.watchers import serving
from events.base import Cause, Envelope
from events.deployments import DeployRequested, Scale, UndeployRequested
from events.types import DeploymentKind, DeploymentStatus, new_id
from mini_studio.drivers.kubernetes.driver import KubernetesDriver
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.settings import Kubernetes, Serving, Settings
from mini_studio.wiring import Studio, ended, open_studio
from tests.fakes.real_kubernetes import RealKubernetes

CAUSE = Cause(correlation_id="test", causation_id="test", traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")


@dataclass
class Reconciled:
    """A namespace, and the watcher of consumer `serving` that works on it."""

    studio: Studio
    cluster: RealKubernetes
    namespace: str

    @property
    def driver(self) -> KubernetesDriver:
        assert isinstance(self.studio.serving, KubernetesDriver)
        return self.studio.serving

    async def deploy(self, *, name: str = "", gpu_count: int = 0, model: str = "tiny-llama") -> str:
        """Ask for a release; its id."""
        id = new_id("dep")
        request = DeployRequested(
            deployment_id=id,
            generation=1,
            name=name or f"vllm-base-{id[-12:]}",
            kind=DeploymentKind.BASE,
            model=model,
            base_model=model,
            scale=Scale(gpu_count=gpu_count, min_replicas=1, max_replicas=3, prometheus_threshold=5),
        )
        await self.studio.releases.insert(Release.claim(self._envelope(request, 1)))
        self.studio.releases_changed.set()
        return id

    async def again(self, id: str, **scale: int) -> None:
        """Ask for the same, or for another scale, with a new generation."""
        release = await self.release(id)
        changed = release.request.scale.model_copy(update=scale)
        newer = release.request.model_copy(update={"generation": release.generation + 1, "scale": changed})
        await self.studio.releases.change(ANYONE, id, lambda r: r.want(self._envelope(newer, newer.generation)))
        self.studio.releases_changed.set()

    async def undeploy(self, id: str) -> None:
        release = await self.release(id)
        event = UndeployRequested(deployment_id=id, generation=release.generation + 1, name=release.request.name)
        await self.studio.releases.change(ANYONE, id, lambda r: r.want(self._envelope(event, event.generation)))
        self.studio.releases_changed.set()

    async def release(self, id: str) -> Release:
        found = await self.studio.releases.get(ANYONE, id)
        assert found is not None
        return found

    async def name(self, id: str) -> str:
        return (await self.release(id)).request.name

    async def becomes(self, id: str, status: DeploymentStatus, seconds: float = 30) -> Release:
        return await self.until(id, lambda release: release.status is status, seconds)

    async def until(self, id: str, wanted: Callable[[Release], bool], seconds: float = 30) -> Release:
        deadline = time.monotonic() + seconds
        while not wanted(release := await self.release(id)):
            assert time.monotonic() < deadline, f"it stayed {release.status}: {release.message}"
            await asyncio.sleep(0.05)
        return release

    async def events(self, id: str) -> list[str]:
        return [entry["headers"]["ce_type"].split(".")[1] for entry in (await self.release(id)).outbox]

    def objects(self) -> set[str]:
        """Kind and name of all that a release can have."""
        kinds = (
            "deployments,services,configmaps,networkpolicies,poddisruptionbudgets,scaledobjects,hpa,replicasets,pods"
        )
        found = self.cluster.get(kinds, self.namespace)
        return {f"{o['kind']}/{o['metadata']['name']}" for o in found} - {"ConfigMap/kube-root-ca.crt"}

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, given=given)

    def _envelope(self, event: DeployRequested | UndeployRequested, sequence: int) -> Envelope[DeployRequested]:
        return Envelope.of(event, subject=event.deployment_id, sequence=sequence, client_code="acme", cause=CAUSE)  # type: ignore[return-value]


@contextlib.asynccontextmanager
async def reconciling(cluster: RealKubernetes, data: Path, kubernetes: Kubernetes) -> AsyncIterator[Reconciled]:
    """The reconciler, running; `kubernetes` says as whom, and where."""
    settings = Settings(data=data, serving=Serving(driver="kubernetes", poll_s=0.5, kubernetes=kubernetes))
    settings.models.mkdir(parents=True, exist_ok=True)
    async with open_studio(settings) as studio:
        watching = asyncio.create_task(serving.watch(studio))
        yield Reconciled(studio, cluster, kubernetes.namespace)
        await ended(watching)
