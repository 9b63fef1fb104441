"""Which replica of a deployment answers a request.

Requests with the same beginning go to the same replica by consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, "Consistent Hashing with Bounded Loads", 2016, arXiv 1608.01350), all others to the one with the least in flight.
A replica that fails again and again is ejected, and probed back in.
"""

import asyncio
import functools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Container, Sequence
from hashlib import blake2b

import structlog
from prometheus_client import Counter, Gauge

from mini_studio.bus.routes import RouteTable
from mini_studio.records.routes import Route
from mini_studio.settings import Gateway

log = structlog.get_logger(__name__)

EJECTED_AT_MOST_S = 60.0
"""What the doubling of an ejection ends at, unless the first one is longer already."""
POINTS = 128
"""Of each replica on the ring: their shares of the prompts differ by a tenth or so."""
RINGS = 1024
"""Kept at most. A ring of eight takes a millisecond to build."""
FORGET_EVERY_S = 1.0

EJECTIONS = Counter(
    "mini_studio_gateway_ejections", "Times that a replica was given no more requests for a while.", ["deployment"]
)
EJECTED = Gauge("mini_studio_gateway_ejected_replicas", "Replicas that are given no requests now.", ["deployment"])


class Probe(str):
    """The address of an ejected replica, as the one request gets it that finds out whether it is well again."""

    __slots__ = ()


class Replica:
    """One endpoint: what it has in flight here, and how it failed."""

    __slots__ = (
        "alone", "deployment", "ejected_at", "ejections", "endpoint", "failures", "in_flight", "probing", "until",
    )  # fmt: skip

    def __init__(self, endpoint: str, deployment: str) -> None:
        self.endpoint = endpoint
        self.deployment = deployment
        self.alone = False
        """Whether its deployment has no other endpoint."""
        self.in_flight = 0
        self.failures = 0
        """In a row."""
        self.ejections = 0
        """In a row; 0 when it is not ejected."""
        self.ejected_at = self.until = 0.0
        self.probing = False

    def taken(self, *, alone: bool = False) -> str:
        self.in_flight += 1
        self.alone = alone
        return self.endpoint

    def probed(self) -> str:
        self.taken()
        self.probing = True
        return Probe(self.endpoint)

    def due(self, now: float) -> bool:
        """Whether an ejected one should be probed."""
        return not self.probing and now >= self.until

    def eject(self, now: float, first_s: float) -> None:
        limit = max(first_s, EJECTED_AT_MOST_S)
        self.until = now + min(first_s * 2.0 ** min(self.ejections, 32), limit)
        self.ejected_at = now
        self.ejections += 1
        self.probing = False

    def restore(self) -> None:
        self.failures = self.ejections = 0
        self.probing = False


class Replicas:
    """This process's view of all replicas: what each has in flight here, and which ones fail."""

    def __init__(self, settings: Gateway, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self._ejected: dict[str, int] = {}
        """How many of a deployment, while there is one."""
        self._turn = 0

    def take(self, route: Route, beginning: bytes | None = None, but: str | None = None) -> str | None:
        """The endpoint for one more request, counted as in flight from now on; None when there is none besides `but`.

        `beginning` is the first part of the prompt (None: no affinity), `but` the endpoint that failed just now.
        What is returned has to be given back to `done` itself: it may say more than an equal string does.
        It takes time in proportion to the number of replicas, the choice on the ring as the logarithm of it.
        """
        endpoints = route.endpoints
        if len(endpoints) == 1:
            replica = self._replicas.get(endpoints[0]) or self._add(endpoints[0], route)
            return None if replica.endpoint == but else replica.taken(alone=True)
        every = [
            self._replicas.get(endpoint) or self._add(endpoint, route) for endpoint in endpoints if endpoint != but
        ]
        usable = [replica for replica in every if not replica.ejections]
        if len(usable) < len(every):
            # A request that failed once is not risked again.
            if (but is None or not usable) and (probe := self._to_probe(every)) is not None:
                return probe.probed()
            usable = usable or [min(every, key=lambda replica: replica.ejected_at)]
        if len(usable) < 2:
            return usable[0].taken() if usable else None
        if beginning is None:
            return self._least_loaded(usable).taken()
        return self._nearest(usable, endpoints, beginning).taken()

    def done(self, endpoint: str, *, failed: bool | None) -> None:
        """The request is over. `failed`: the replica itself was at fault (no connection, 502 or 503, broke off, fell silent).

        None: it was given up before the replica said anything.
        """
        replica = self._replicas[endpoint]
        replica.in_flight -= 1
        if failed is None:
            replica.probing = replica.probing and not isinstance(endpoint, Probe)
        elif failed:
            self._failed(replica, probe=isinstance(endpoint, Probe))
        elif replica.failures:
            self._restore(replica)

    def keep(self, endpoints: Container[str]) -> None:
        """Forget all others; those that have something in flight at the next call."""
        gone = [replica for endpoint, replica in self._replicas.items() if endpoint not in endpoints]
        for replica in gone:
            self._restore(replica)
            if not replica.in_flight:
                del self._replicas[replica.endpoint]
        left = {replica.deployment for replica in self._replicas.values()}
        for deployment in {replica.deployment for replica in gone} - left:
            EJECTIONS.remove(deployment)

    def _add(self, endpoint: str, route: Route) -> Replica:
        self._replicas[endpoint] = replica = Replica(endpoint, route.name)
        return replica

    def _to_probe(self, replicas: Sequence[Replica]) -> Replica | None:
        now = self._clock()
        return next((replica for replica in replicas if replica.ejections and replica.due(now)), None)

    def _failed(self, replica: Replica, *, probe: bool) -> None:
        replica.failures += 1
        if replica.alone:
            self._restore(replica)
        elif not replica.ejections:
            if replica.failures >= self._settings.eject_after:
                self._eject(replica)
        elif probe or (replica.probing and not replica.in_flight):
            self._eject(replica)
        else:
            # When all are ejected they take turns. What began before the ejection says nothing of the probe.
            replica.ejected_at = self._clock()

    def _eject(self, replica: Replica) -> None:
        deployment = replica.deployment
        if not replica.ejections:
            self._count(deployment, 1)
        EJECTIONS.labels(deployment).inc()
        replica.eject(self._clock(), self._settings.eject_s)
        log.warning("replica.ejected", deployment=deployment, endpoint=replica.endpoint, failures=replica.failures)

    def _restore(self, replica: Replica) -> None:
        if replica.ejections:
            self._count(replica.deployment, -1)
            log.info("replica.restored", deployment=replica.deployment, endpoint=replica.endpoint)
        replica.restore()

    def _count(self, deployment: str, change: int) -> None:
        count = self._ejected.pop(deployment, 0) + change
        if count:
            self._ejected[deployment] = count
            EJECTED.labels(deployment).set(count)
        else:
            EJECTED.remove(deployment)

    def _least_loaded(self, replicas: Sequence[Replica]) -> Replica:
        """In turn, where several have as little to do."""
        self._turn += 1
        first = self._turn % len(replicas)
        return min((*replicas[first:], *replicas[:first]), key=lambda replica: replica.in_flight)

    def _nearest(self, replicas: Sequence[Replica], endpoints: Sequence[str], beginning: bytes) -> Replica:
        """The next one on the ring with room: none has more than `affinity_load` times the mean, rounded up, this request included."""
        in_flight = 1 + sum(replica.in_flight for replica in replicas)
        room = math.ceil(self._settings.affinity_load * in_flight / len(replicas))
        open_ = {replica.endpoint: replica for replica in replicas if replica.in_flight < room}
        return open_[Ring.of(tuple(endpoints)).nearest(beginning, open_)]


class Ring:
    """Places of some endpoints on a circle of 64 bits: the same ones in every process, and each endpoint's whatever the others are."""

    def __init__(self, endpoints: Sequence[str]) -> None:
        points = sorted((_place(f"{endpoint} {n}".encode()), endpoint) for endpoint in endpoints for n in range(POINTS))
        self._places = [place for place, _ in points]
        self._owners = [owner for _, owner in points]

    @staticmethod
    @functools.lru_cache(maxsize=RINGS)
    def of(endpoints: tuple[str, ...]) -> "Ring":
        return Ring(endpoints)

    def nearest(self, key: bytes, among: Container[str]) -> str:
        """The first of `among`, clockwise from the key. Raises `LookupError` when none of them is on the ring."""
        start = bisect_right(self._places, _place(key))
        for n in range(start - len(self._owners), start):
            if self._owners[n] in among:
                return self._owners[n]
        raise LookupError("none of these endpoints is on the ring")


def _place(text: bytes) -> int:
    return int.from_bytes(blake2b(text, digest_size=8).digest())


async def follow(replicas: Replicas, routes: RouteTable) -> None:
    """Have it forget the replicas that no route has any more, until cancelled."""
    seen = -1
    while True:
        seen = await routes.changed(seen)
        replicas.keep({endpoint for route in routes.all() for endpoint in route.endpoints})
        await asyncio.sleep(FORGET_EVERY_S)
