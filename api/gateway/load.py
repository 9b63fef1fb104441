"""What this process's gateway counts: the requests each deployment has here, which it is scaled by, from zero too; and all answers."""

import contextlib
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Durations:
    """A histogram of seconds. Prometheus's own takes a lock for each observation; here is only the event loop."""

    __slots__ = ("buckets", "total_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        return [(bound, sum(self.buckets[: index + 1])) for index, bound in enumerate(bounds)]


class Load:
    """This process's counts. An idle deployment has no series of its load: Prometheus's sum over none is no load."""

    def __init__(self) -> None:
        self.requests: dict[str, int] = {}
        """Requests that wait or are being answered, per deployment."""
        self.answers: dict[tuple[str, int], int] = {}
        self.durations: dict[str, Durations] = {}
        COUNTED.add(self)

    def enter(self, deployment: str) -> None:
        self.requests[deployment] = self.requests.get(deployment, 0) + 1

    def leave(self, deployment: str) -> None:
        left = self.requests[deployment] - 1
        if left:
            self.requests[deployment] = left
        else:
            del self.requests[deployment]

    def answered(self, deployment: str, status: int, seconds: float) -> None:
        """A request is over, seconds after it arrived."""
        key = (deployment, status)
        self.answers[key] = self.answers.get(key, 0) + 1
        durations = self.durations.get(deployment)
        if durations is None:
            durations = self.durations[deployment] = Durations()
        durations.observe(seconds)

    @contextlib.contextmanager
    def counted(self, deployment: str) -> Iterator[None]:
        self.enter(deployment)
        try:
            yield
        finally:
            self.leave(deployment)


COUNTED: weakref.WeakSet[Load] = weakref.WeakSet()


class _Series(Collector):
    """Reads the counts when Prometheus asks, so that counting itself costs next to nothing."""

    def describe(self) -> Iterable[Metric]:
        return (_requests(), _answers(), _durations())

    def collect(self) -> Iterable[Metric]:
        requests, answers, durations = _requests(), _answers(), _durations()
        for load in COUNTED:
            for deployment, number in load.requests.items():
                requests.add_metric([deployment], number)
            for (deployment, status), number in load.answers.items():
                answers.add_metric([deployment, str(status)], number)
            for deployment, seen in load.durations.items():
                durations.add_metric([deployment], seen.cumulative(), seen.total_s)
        return (requests, answers, durations)


def _requests() -> GaugeMetricFamily:
    text = "Requests of a deployment that wait or are being answered here."
    return GaugeMetricFamily("mini_studio_gateway_requests", text, labels=["deployment"])


def _answers() -> CounterMetricFamily:
    text = "Requests of a deployment that were answered, by HTTP status; 499: the client hung up before it had one."
    return CounterMetricFamily("mini_studio_gateway_requests", text, labels=["deployment", "status"])


def _durations() -> HistogramMetricFamily:
    text = "From a request's arrival to the end of its answer."
    return HistogramMetricFamily("mini_studio_gateway_request_seconds", text, labels=["deployment"])


REGISTRY.register(_Series())
