"""How many requests each deployment has here: what KEDA scales it by, from zero too."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from prometheus_client import Gauge

REQUESTS = Gauge(
    "mini_studio_gateway_requests", "Requests of a deployment that wait or are being answered here.", ["deployment"]
)


class Load:
    """This process's count. An idle deployment has no series: Prometheus's sum over none is no load."""

    def __init__(self) -> None:
        self._requests: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, deployment: str) -> Iterator[None]:
        self._add(deployment, 1)
        try:
            yield
        finally:
            self._add(deployment, -1)

    def _add(self, deployment: str, change: int) -> None:
        self._requests[deployment] += change
        if self._requests[deployment]:
            REQUESTS.labels(deployment).set(self._requests[deployment])
        else:
            del self._requests[deployment]
            REQUESTS.remove(deployment)
