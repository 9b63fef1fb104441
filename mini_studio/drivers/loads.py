"""Reads from the gateways what KEDA reads through Prometheus: how many requests of each deployment wait or run there."""

import asyncio
import contextlib
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import httpx
import structlog

from mini_studio.drivers.scaling import Load

log = structlog.get_logger(__name__)

SERIES = re.compile(r'^mini_studio_gateway_requests\{deployment="([a-z0-9-]{1,63})"\} (\S{1,32})$', re.MULTILINE)
TOTALS = re.compile(
    r'^mini_studio_gateway_requests_total\{deployment="([a-z0-9-]{1,63})",status="\d{3}"\} (\S{1,32})$', re.MULTILINE
)
ANSWER_S = 2.0
MAX_BYTES = 16 * 1024 * 1024


class GatewayLoads:
    """The load at all of `gateways` (base URLs), read at most once in `fresh_s` seconds, and only when somebody asks."""

    def __init__(self, gateways: Sequence[str], fresh_s: float) -> None:
        self._gateways = [gateway.rstrip("/") for gateway in gateways]
        self._fresh_s = fresh_s
        self._client = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False)
        self._reading = asyncio.Lock()
        self._read_at = -math.inf
        self._requests: Mapping[str, float] = {}
        self._silent: Sequence[str] = []
        self._totals: dict[str, Mapping[str, float]] = {}
        """All requests so far, by gateway and deployment."""

    async def of(self, deployment: str) -> Load:
        async with self._reading:
            if time.monotonic() - self._read_at > self._fresh_s:
                await self._read()
        return Load(self._requests.get(deployment, 0.0), complete=bool(self._gateways) and not self._silent)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _read(self) -> None:
        answers = await asyncio.gather(*map(self._ask, self._gateways))
        requests: Counter[str] = Counter()
        for answer in answers:
            requests.update(requests_in(answer or ""))
        for gateway, answer in zip(self._gateways, answers, strict=True):
            for deployment in self._asked(gateway, answer):
                requests[deployment] = max(requests[deployment], 1)
        silent = [gateway for gateway, answer in zip(self._gateways, answers, strict=True) if answer is None]
        if silent != self._silent:
            log.warning("serving.gateways_silent", gateways=silent) if silent else log.info("serving.gateways_answer")
        self._requests, self._silent, self._read_at = requests, silent, time.monotonic()

    def _asked(self, gateway: str, metrics: str | None) -> list[str]:
        """Deployments that were asked since the last look: what came and went between two looks counts, too."""
        if metrics is None:
            return []
        before, now = self._totals.get(gateway), totals_in(metrics)
        self._totals[gateway] = now
        return [] if before is None else [name for name, total in now.items() if total != before.get(name, 0.0)]

    async def _ask(self, gateway: str) -> str | None:
        """None: it does not answer, or not as a gateway does."""
        try:
            async with asyncio.timeout(ANSWER_S), self._client.stream("GET", f"{gateway}/metrics") as response:
                content = b""
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_BYTES:
                        return None
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
            return None
        return content.decode(errors="replace") if response.is_success else None


def totals_in(metrics: str) -> dict[str, float]:
    found: defaultdict[str, float] = defaultdict(float)
    for deployment, text in TOTALS.findall(metrics):
        with contextlib.suppress(ValueError):
            found[deployment] += float(text)
    return found


def requests_in(metrics: str) -> dict[str, float]:
    """The requests by deployment that a process tells in Prometheus's text format. What is no number of requests is left out."""
    found = {}
    for deployment, text in SERIES.findall(metrics):
        try:
            requests = float(text)
        except ValueError:
            continue
        if math.isfinite(requests) and requests > 0:
            found[deployment] = requests
    return found
