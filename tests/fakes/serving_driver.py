"""A serving driver in memory, for tests of what stands on the port. It serves nothing: the test says what becomes of a release."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from mini_studio.drivers.ports import ReleaseReport, ReleaseSpec, ReleaseState
from mini_studio.errors import Conflict, Refused, Unavailable


@dataclass
class FakeRelease:
    spec: ReleaseSpec
    state: ReleaseState
    message: str = ""
    applied: int = 1
    """How often this very spec was applied."""
    replicas: int | None = None
    """As an autoscaler has it; None: as the spec wants."""


class FakeServingDriver:
    """Implements `ServingDriver`. With `becomes_ready` a release is ready as soon as it is applied."""

    def __init__(self, *, becomes_ready: bool = True) -> None:
        self.releases: dict[str, FakeRelease] = {}
        self.becomes_ready = becomes_ready
        self.away = False
        """While true every call fails as if the backend did not answer."""
        self.refuses: str | None = None
        """While set every `apply` is refused with this message."""
        self.woken: list[str] = []
        """Names of the releases that it was told to wake."""
        self.endpoint = "http://127.0.0.1:9"
        """What a ready release answers at; tests may point it at a stub server."""

    # --- what a test does to it

    def ready(self, name: str) -> None:
        self.releases[name].state = ReleaseState.READY

    def crash(self, name: str) -> None:
        """Its servers are gone and are being started again."""
        self.releases[name].state = ReleaseState.STARTING

    def scale(self, name: str, replicas: int) -> None:
        """An autoscaler did so; one address stands before all replicas."""
        self.releases[name].replicas = replicas

    def fail(self, name: str, message: str) -> None:
        self.releases[name].state, self.releases[name].message = ReleaseState.FAILED, message

    def forget(self) -> None:
        """Everything was deleted behind the studio's back."""
        self.releases.clear()

    # --- the port

    async def apply(self, spec: ReleaseSpec) -> None:
        self._answer()
        if self.refuses is not None:
            raise Refused(self.refuses)
        held = self.releases.get(spec.name)
        if held is not None and held.spec.deployment_id != spec.deployment_id:
            raise Conflict(f"the name {spec.name} belongs to {held.spec.deployment_id}")
        if held is not None and held.spec.generation > spec.generation:
            raise Conflict(f"{spec.name} has gone on to generation {held.spec.generation}")
        if held is not None and held.spec == spec:
            held.applied += 1
            return
        state = ReleaseState.READY if self.becomes_ready else ReleaseState.STARTING
        self.releases[spec.name] = FakeRelease(spec, state)

    async def observe(self, name: str) -> ReleaseReport | None:
        self._answer()
        held = self.releases.get(name)
        if held is None:
            return None
        replicas = max(1, held.spec.min_replicas) if held.state is ReleaseState.READY else 0
        return ReleaseReport(
            name,
            held.spec.deployment_id,
            held.spec.generation,
            held.state,
            replicas if held.replicas is None else held.replicas,
            endpoints=[self.endpoint] * (replicas if held.replicas is None else 1),
            message=held.message,
        )

    async def remove(self, name: str, deployment_id: str, generation: int) -> None:
        self._answer()
        held = self.releases.get(name)
        if held and held.spec.deployment_id == deployment_id and held.spec.generation <= generation:
            del self.releases[name]

    async def wake(self, name: str, deployment_id: str) -> None:
        self._answer()
        self.woken.append(name)
        held = self.releases.get(name)
        if held is not None and held.spec.deployment_id == deployment_id and held.replicas == 0:
            held.replicas = None

    async def list(self) -> AsyncIterator[ReleaseReport]:
        for name in sorted(self.releases):
            if (report := await self.observe(name)) is not None:
                yield report

    def _answer(self) -> None:
        if self.away:
            raise Unavailable("the serving backend is away")
