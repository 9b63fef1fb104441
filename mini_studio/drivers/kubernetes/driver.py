"""Serving on Kubernetes. Implements `ServingDriver`.

What the cluster has is mirrored by watches, so a turn of the reconciler over releases that are as they should be costs no request.
Whatever differs from what is wanted, by a new generation or by somebody's hand, is looked at afresh, compared by the full ids in its
annotations, and applied at the very version that was looked at. What has the name and another id is never changed or deleted.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import structlog

from mini_studio.drivers.catalogue import ModelCatalogue
from mini_studio.drivers.kubernetes.api import DEPLOYMENT, POD, Kind, KubeApi, Object
from mini_studio.drivers.kubernetes.manifests import (
    CLIENT_CODE,
    DEPLOYMENT_ID,
    GENERATION,
    KINDS,
    RELEASE,
    SELECTOR,
    WEIGHTS,
    Content,
    annotation,
    covers,
    manifests,
)
from mini_studio.drivers.kubernetes.mirror import Mirror
from mini_studio.drivers.kubernetes.state import complete, report
from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.drivers.releases import NAME, confined
from mini_studio.errors import Conflict, Refused, Unavailable
from mini_studio.settings import Serving

log = structlog.get_logger(__name__)

SYNC_S = 10.0
"""How long the first call waits until the cluster was read."""
CANNOT_TRY = "does not support dry run"
"""What the API server says of an admission webhook that has side effects."""
LOOKS = 5
"""How often an object that keeps changing is looked at and applied anew."""


class KubernetesDriver:
    """One instance per process; any number of processes may share a namespace. `changed` is called when the cluster changes."""

    def __init__(self, models_root: Path, settings: Serving, changed: Callable[[], None] = lambda: None) -> None:
        self.api = KubeApi(settings.kubernetes)
        self._models_root = models_root.resolve()
        self._catalogue = ModelCatalogue(self._models_root)
        self._settings = settings.kubernetes
        self._patience_s = settings.ready_timeout_s
        self.mirrors = {kind: Mirror(self.api, kind, SELECTOR, changed) for kind in (*KINDS, POD)}
        self._watching: list[asyncio.Task[None]] = []
        self._planned: dict[str, tuple[ReleaseSpec, Sequence[tuple[Kind, Object]]]] = {}
        """The objects that were last wanted of each release, by name."""
        self._answers: dict[tuple[Kind, str], tuple[Object, Object]] = {}
        """What was applied and what became of it, where the server's answer was something else."""
        self._completed: dict[str, tuple[str, int]] = {}
        """Deployment id and generation whose rollout was seen completed, by name."""

    async def aclose(self) -> None:
        """Stop watching; what is in the cluster goes on."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        await self.api.aclose()

    async def apply(self, spec: ReleaseSpec) -> None:
        await self._synced(to_apply=True)
        self._check_name(spec.name)
        held = self.mirrors[DEPLOYMENT].get(spec.name)
        if held is not None:
            self._compare(held, spec)
            self._note_completion(held)  # before what follows may begin another rollout
        differing = [part for part in await self.wanted(spec) if not self._as_wanted(*part)]
        try:
            if held is None:
                # What the cluster refuses of it, it refuses before anything is there.
                for kind, manifest in differing:
                    await self._apply(kind, manifest, spec, dry_run=True)
            for kind, manifest in differing:
                await self._apply(kind, manifest, spec)
                log.info("kubernetes.applied", kind=kind.name, name=spec.name, generation=spec.generation)
        except Refused:
            if held is None:
                with contextlib.suppress(Unavailable):
                    await self.remove(spec.name, spec.deployment_id, spec.generation)
            raise

    async def observe(self, name: str) -> ReleaseReport | None:
        await self._synced()
        deployment = self.mirrors[DEPLOYMENT].get(name)
        if deployment is None or not _is_release(deployment):
            return None
        self._note_completion(deployment)
        of = (_id(deployment), _generation(deployment))
        endpoint = self._settings.endpoint.format(name=name, namespace=self._settings.namespace)
        return report(deployment, self._pods(name), endpoint, was_complete=self._completed.get(name) == of)

    async def remove(self, name: str, deployment_id: str, generation: int) -> None:
        """Raises `Unavailable` until the last object, and the last pod, is gone."""
        await self._synced()
        self._check_name(name)
        ending = [k.name for k in reversed(KINDS) if await self._removed(k, name, deployment_id, generation)]
        successor = await self.api.get(DEPLOYMENT, name)
        pods = [pod for pod in self._pods(name) if _id(pod) == deployment_id] if successor is None else []
        if ending or pods:
            left = ", ".join(ending + [f"{len(pods)} pods"] * bool(pods))
            raise Unavailable(f"{name} is being removed; still ending: {left}.")
        self._completed.pop(name, None)
        self._planned.pop(name, None)
        for kind in KINDS:
            self._answers.pop((kind, name), None)

    async def wake(self, name: str, deployment_id: str) -> None:
        """KEDA does, by the same load."""

    async def list(self) -> AsyncIterator[ReleaseReport]:
        """Releases, and what is left of any whose Deployment is gone."""
        await self._synced()
        names = {
            found["metadata"]["name"] for kind in KINDS for found in self.mirrors[kind].all() if _is_release(found)
        }
        for name in sorted(names):
            seen = await self.observe(name)
            yield seen or self._remains(name)

    async def _synced(self, *, to_apply: bool = False) -> None:
        """Start to mirror the cluster, and wait until it was read once.

        A kind that it has not, or that may not be read, holds nothing up; only `to_apply` it is needed.
        """
        if not self._watching:
            self._watching = [asyncio.create_task(mirror.run()) for mirror in self.mirrors.values()]
        deadline = time.monotonic() + SYNC_S
        while unread := [mirror for mirror in self.mirrors.values() if not mirror.synced.is_set()]:
            refused = [mirror.problem for mirror in unread if isinstance(mirror.problem, Refused)]
            if len(refused) == len(unread):
                if to_apply:
                    raise refused[0]
                return
            if time.monotonic() > deadline:
                problems = [mirror.problem.message for mirror in unread if mirror.problem]
                raise Unavailable(problems[0] if problems else "the cluster is still being read")
            await asyncio.sleep(0.05)

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise Refused(f"{name[:80]!r} cannot name a deployment.")

    async def wanted(self, spec: ReleaseSpec) -> Sequence[tuple[Kind, Object]]:
        """Made once for a spec: what a link points at later changes nothing until a new generation, in any process."""
        planned = self._planned.get(spec.name)
        if planned is None or planned[0] != spec:
            held = self._held_content(spec)
            content = await asyncio.to_thread(self._content, spec) if held is None else held
            planned = spec, manifests(spec, content, self._settings, patience_s=self._patience_s)
            self._planned[spec.name] = planned
        return planned[1]

    def _held_content(self, spec: ReleaseSpec) -> Content | None:
        """What this generation serves already, chosen by whoever applied it first."""
        held = self.mirrors[DEPLOYMENT].get(spec.name)
        if held is None or (_id(held), _generation(held)) != (spec.deployment_id, spec.generation):
            return None
        weights = held["metadata"]["annotations"].get(WEIGHTS)
        return None if weights is None else Content(str(self._models_root), weights or None)

    def _content(self, spec: ReleaseSpec) -> Content:
        """The files that the pods mount: fine-tuned weights, or an installed base model; others their servers fetch. Raises `Refused`."""
        root = self._models_root
        if spec.weights_path is not None:
            return Content(str(root), str(confined(spec.weights_path, spec.client_code, root)))
        folder = self._catalogue.folder(spec.base_model)
        return Content(str(root), str(folder) if folder is not None and folder.is_relative_to(root) else None)

    def _pods(self, name: str) -> Sequence[Object]:
        return [pod for pod in self.mirrors[POD].all() if pod["metadata"]["labels"].get(RELEASE) == name]

    def _note_completion(self, deployment: Object) -> None:
        if complete(deployment):
            self._completed[deployment["metadata"]["name"]] = (_id(deployment), _generation(deployment))

    def _as_wanted(self, kind: Kind, manifest: Object) -> bool:
        """Whether the object is as it was applied, or as the server's answer to that was: an admission webhook may insist on its own."""
        name = manifest["metadata"]["name"]
        live, answered = self.mirrors[kind].get(name), self._answers.get((kind, name))
        if live is None or "deletionTimestamp" in live["metadata"]:
            return False
        return covers(live, manifest) or (
            answered is not None and answered[0] == manifest and covers(live, answered[1])
        )

    async def _apply(self, kind: Kind, manifest: Object, spec: ReleaseSpec, *, dry_run: bool = False) -> None:
        """Look, compare, apply at that version; again when somebody else was faster."""
        for left in reversed(range(LOOKS)):
            live = await self.api.get(kind, spec.name)
            wanted = manifest
            if live is not None:
                self._compare(live, spec)
                at = {**manifest["metadata"], "resourceVersion": live["metadata"]["resourceVersion"]}
                wanted = {**manifest, "metadata": at}
            try:
                applied = await self.api.apply(kind, wanted, force=live is not None, dry_run=dry_run)
            except Refused as error:
                if dry_run and CANNOT_TRY in error.message:
                    return
                raise
            except Conflict as error:
                if not left:
                    raise Unavailable(f"{kind.name} {spec.name} keeps being changed: {error.message}") from error
                continue
            if not dry_run:
                self._take_answer(kind, manifest, applied)
            return

    def _take_answer(self, kind: Kind, manifest: Object, applied: Object) -> None:
        self.mirrors[kind].put(applied)
        self._answers.pop((kind, manifest["metadata"]["name"]), None)
        if not covers(applied, manifest):
            answer: Object = {part: applied[part] for part in ("data", "spec") if part in applied}
            answer["metadata"] = {part: applied["metadata"][part] for part in ("labels", "annotations")}
            self._answers[kind, manifest["metadata"]["name"]] = manifest, answer
            log.warning("kubernetes.changed_by_others", kind=kind.name, name=manifest["metadata"]["name"])

    def _compare(self, live: Object, spec: ReleaseSpec) -> None:
        """Raises `Conflict` when the object is not this release's, or of a newer generation; `Unavailable` while it is ending."""
        kind, name = live.get("kind", "object"), live["metadata"]["name"]
        if _id(live) != spec.deployment_id:
            owner = f"belongs to the deployment {_id(live)}" if _id(live) else "is not this studio's"
            raise Conflict(f"The {kind} {name} in namespace {self._settings.namespace} {owner}.")
        if _generation(live) > spec.generation:
            raise Conflict(f"{name} has gone on to generation {_generation(live)}.")
        if "deletionTimestamp" in live["metadata"]:
            raise Unavailable(f"The {kind} {name} is still being deleted.")

    async def _removed(self, kind: Kind, name: str, deployment_id: str, generation: int) -> bool:
        """Delete this release's object of a kind; whether it is still there, because its end takes a while."""
        for _ in range(LOOKS):
            live = await self.api.get(kind, name)
            if live is None or _id(live) != deployment_id or _generation(live) > generation:
                return False
            if "deletionTimestamp" in live["metadata"]:
                return True
            metadata = live["metadata"]
            with contextlib.suppress(Conflict):
                await self.api.delete(kind, name, uid=metadata["uid"], version=metadata["resourceVersion"])
        return await self.api.get(kind, name) is not None

    def _remains(self, name: str) -> ReleaseReport:
        """What is left of a release without a Deployment."""
        found = next(part for kind in KINDS for part in self.mirrors[kind].all() if part["metadata"]["name"] == name)
        kinds = [kind.name for kind in KINDS if self.mirrors[kind].get(name)]
        message = f"Only its {', '.join(kinds)} are left."
        return ReleaseReport(name, _id(found), _generation(found), ReleaseState.FAILED, message=message)


def _is_release(found: Object) -> bool:
    theirs = CLIENT_CODE in found["metadata"].get("annotations", {})  # empty where all clients share it
    return theirs and bool(_id(found)) and annotation(found, GENERATION).isdigit()


def _id(found: Object) -> str:
    return annotation(found, DEPLOYMENT_ID)


def _generation(found: Object) -> int:
    generation = annotation(found, GENERATION)
    return int(generation) if generation.isdigit() else 0
