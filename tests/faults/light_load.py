"""A light, steady load of every kind on a studio: uploads, submits, a deployment, inference. What clients see of it is counted."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

ROWS = b'{"prompt": "Who? ", "completion": "me"}\n' * 4
CLIENT = "acme"
MODEL = "tiny-llama"


class Load:
    """Calls every few milliseconds until told to stop."""

    def __init__(self, url: str, every_s: float = 0.25, submit_every_s: float = 0.25) -> None:
        self.every_s, self.submit_every_s = every_s, submit_every_s
        self._client = httpx.AsyncClient(base_url=url, timeout=60, trust_env=False)
        self._numbers = itertools.count()
        self._datasets: list[str] = []
        self.statuses: Counter[str] = Counter()
        """Answers by kind of request and status."""
        self.failures: list[str] = []
        """What no client should see: 5xx, and connections that broke."""
        self.slowest_s = 0.0

    async def deploy(self) -> None:
        """Deploy the base model, and wait until it answers."""
        await self.ask("deploy", "POST", "/inference/deploy/base", json={"model_id": MODEL, "gpu_count": 0})
        deadline = time.monotonic() + 300
        while (await self._client.post(f"/inference/infer/{MODEL}", json=self._question())).status_code != 200:
            assert time.monotonic() < deadline, "the model does not answer"
            await asyncio.sleep(0.5)

    async def run(self, until: asyncio.Event) -> None:
        """Each kind of request goes on its own."""
        kinds = [self.upload, self.infer, self.stream, self.look]
        repeating = [self._repeat(kind, lambda: self.every_s, until) for kind in kinds]
        await asyncio.gather(self._repeat(self.submit, lambda: self.submit_every_s, until), *repeating)
        await self._client.aclose()

    async def _repeat(
        self, call: Callable[[], Awaitable[Any]], every_s: Callable[[], float], until: asyncio.Event
    ) -> None:
        while not until.is_set():
            await call()
            await asyncio.sleep(every_s())

    async def upload(self) -> None:
        answer = await self.ask(
            "upload", "POST", f"/fine_tuning/upload-dataset/{CLIENT}", files={"file": ("rows.jsonl", ROWS)}
        )
        if answer is not None:
            self._datasets = [answer["dataset_id"]]

    async def submit(self) -> None:
        for dataset in self._datasets:
            body = {"model": MODEL, "client_code": CLIENT, "dataset_filename": dataset}
            await self.ask("submit", "POST", "/fine_tuning/submit-finetune", json=body)

    async def infer(self) -> None:
        await self.ask("infer", "POST", f"/inference/infer/{MODEL}", json=self._question())

    async def stream(self) -> None:
        """An answer in pieces, which has to come to its end."""
        await self.ask("stream", "POST", f"/inference/infer/{MODEL}", json={**self._question(), "stream": True})

    async def look(self) -> None:
        await self.ask("look", "GET", f"/fine_tuning/jobs/client/{CLIENT}")

    async def ask(self, kind: str, method: str, path: str, **options: Any) -> Any:
        """The answer's JSON if it is one of 2xx."""
        began = time.monotonic()
        try:
            response = await self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            self.failures.append(f"{kind}: {error!r}")
            return None
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.statuses[f"{kind} {response.status_code}"] += 1
        if response.status_code >= 500:
            self.failures.append(f"{kind}: {response.status_code} {response.text[:200]}")
        if kind == "stream" and response.is_success and "[DONE]" not in response.text:
            self.failures.append(f"{kind}: cut off after {response.text[-100:]!r}")
        return response.json() if response.is_success and kind != "stream" else None

    def _question(self) -> dict[str, Any]:
        return {"prompt": f"What is the word of number {next(self._numbers)}? ", "max_tokens": 8}
