"""Makes the serving driver have what the releases want, and reports what it sees.

A local driver is also told of the requests that wait at the gateways for what sleeps; on Kubernetes KEDA sees them by itself.
"""

import asyncio
import time
from pathlib import Path

import structlog
from prometheus_client import Gauge

from consumers.watchers import apart, turn
from consumers.watchers.decisions import reported
from events.types import DeploymentStatus
from mini_studio.bus.wakeups import follow
from mini_studio.drivers.ports import ReleaseSpec, ReleaseState
from mini_studio.errors import Conflict, Refused, Unavailable
from mini_studio.records.record import ANYONE
from mini_studio.records.releases import Release
from mini_studio.wiring import Studio

log = structlog.get_logger(__name__)

IDLE_S = 10.0
SWEEP_S = 60.0
NAMED = 20
"""Orphans that one line of the log names."""
ORPHANS = Gauge("mini_studio_serving_orphans", "Deployments in the backend that no record of the studio knows.")
WAKING_S = 0.2
"""How often a release is looked at that requests wait for."""
AT_ONCE = 8
"""Releases that are reconciled at the same time."""


async def watch(studio: Studio) -> None:
    """Reconcile until cancelled."""
    turns = [turn(lambda: reconcile(studio), studio.releases_changed), turn(lambda: sweep(studio), asyncio.Event())]
    if studio.settings.serving.driver == "local_process":
        turns.append(follow(studio.settings.kafka, lambda wake_up: wake(wake_up.deployment_id, studio)))
    await asyncio.gather(*turns)


async def reconcile(studio: Studio) -> float:
    """One turn over all releases that are not settled; the seconds until the next one."""
    releases = [release async for release in studio.releases.each(ANYONE, settled=False)]
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(release: Release) -> bool:
        async with slots:
            return await look(release, studio)

    waking = any(await asyncio.gather(*(one(release) for release in releases)))
    poll_s = studio.settings.serving.poll_s if releases else IDLE_S
    return min(poll_s, WAKING_S) if waking else poll_s


async def look(release: Release, studio: Studio) -> bool:
    """Compare, act and report; whether the release is waking."""
    bound = structlog.contextvars.bound_contextvars(
        request_id=release.cause.correlation_id, subject=release.id, event_id=release.cause.causation_id
    )
    with bound, apart():
        if release.wanted:
            return await keep(release, studio)
        await remove(release, studio)
    return False


async def wake(deployment_id: str, studio: Studio) -> None:
    """A request waits for a deployment: look after it now, if it sleeps."""
    with apart():
        release = await studio.releases.get(ANYONE, deployment_id)
        if release is None or release.settled or not release.wanted or not release.asleep:
            return
        await studio.serving.wake(release.request.name, release.id)
        if await look(release, studio):
            log.info("serving.woken", name=release.request.name)
            studio.releases_changed.set()


def spec(release: Release) -> ReleaseSpec:
    request = release.request
    return ReleaseSpec(
        name=request.name,
        deployment_id=release.id,
        generation=release.generation,
        kind=request.kind,
        client_code=release.client_code,
        model=request.model,
        base_model=request.base_model,
        weights_path=Path(request.weights_path) if request.weights_path else None,
        gpu_count=request.scale.gpu_count,
        min_replicas=request.scale.min_replicas,
        max_replicas=request.scale.max_replicas,
        prometheus_threshold=request.scale.prometheus_threshold,
    )


async def keep(release: Release, studio: Studio) -> bool:
    """Apply, observe, report; whether it is waking. What is away for now is tried again at the next turn."""
    generation, new = release.generation, release.status is DeploymentStatus.DEPLOYING
    try:
        refused = await applied(release, studio, new)
        seen = await studio.serving.observe(release.request.name)
    except Unavailable as error:
        log.warning("serving.waiting", reason=error.message)
        return False
    if refused is not None and (new or seen is None):
        # What serves already is not given up because it cannot be repaired just now; what is gone and cannot be made anew is.
        why, for_good = refused, new
        await studio.releases.change(
            release.client_code, release.id, lambda r: r.fail(generation, why, refused=for_good)
        )
        return False
    if refused is not None:
        log.warning("serving.not_repaired", reason=refused)
    now, patience_s = time.time(), studio.settings.serving.ready_timeout_s
    await studio.releases.change(
        release.client_code, release.id, lambda r: reported(r, generation, seen, now=now, patience_s=patience_s)
    )
    return release.asleep and seen is not None and seen.state is ReleaseState.STARTING


async def applied(release: Release, studio: Studio, new: bool) -> str | None:
    """Apply; why it is refused, if it is. What is away is waited out, but keeps nobody from looking at what was applied before."""
    try:
        await studio.serving.apply(spec(release))
    except (Refused, Conflict) as error:
        return error.message
    except Unavailable as error:
        if new:
            raise
        log.warning("serving.waiting", reason=error.message)
    return None


async def remove(release: Release, studio: Studio) -> None:
    try:
        await studio.serving.remove(release.request.name, release.id, release.generation)
    except Unavailable as error:
        log.warning("serving.waiting", reason=error.message)
        return
    await studio.releases.change(release.client_code, release.id, lambda r: r.removed(release.generation))


async def sweep(studio: Studio) -> float:
    """Remove what was applied after its removal, by a watcher that was slow while another one took over; nobody else would look.

    What no release knows, or only as it was before, is reported and left alone: this studio may have lost its records.
    """
    orphans = []
    async for report in studio.serving.list():
        release = await studio.releases.get(ANYONE, report.deployment_id)
        if release is None or report.generation > release.generation:
            orphans.append(report.name)
        elif release.settled and not release.wanted:
            log.warning("serving.swept", name=report.name, generation=report.generation)
            with apart():
                await studio.serving.remove(report.name, release.id, release.generation)
    ORPHANS.set(len(orphans))
    if orphans:
        log.warning("serving.orphans", names=orphans[:NAMED], count=len(orphans))
    return SWEEP_S
