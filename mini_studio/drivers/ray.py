"""Training on a Ray cluster, over its Jobs HTTP API alone: importing `ray` would cost every process of the studio ~200 MB.

Ray's job table is a hint, never the truth: it forgets everything when the head dies, says RUNNING of drivers that are gone, and
ignores a stop of a job that is still pending. What makes that harmless is the attempt's fence (see `workloads.specs`), not this file.

A cluster with RAY_AUTH_MODE=token wants its token with every request. The training itself gets it from the cluster, whose processes
have it in their environment: in the submission it would be shown to everyone who may list jobs.
"""

import asyncio
import contextlib
import json
import math
import re
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from mini_studio.drivers.ports import RunReport, RunState, Workers
from mini_studio.errors import Denied, Refused, StudioError, Unavailable
from workloads import specs

STATUS_S = 1.8
"""Longest wait for the cluster's status: users are promised an answer within 2 s."""
LOG_BYTES = 256 * 1024
"""How much of the end of a log is kept while Ray sends all of it."""

STATES = {
    "PENDING": RunState.PENDING,
    "RUNNING": RunState.RUNNING,
    "SUCCEEDED": RunState.SUCCEEDED,
    "FAILED": RunState.FAILED,
    "STOPPED": RunState.STOPPED,
}
LOST_WORKER = frozenset({"JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE"})
"""Ray calls these FAILED, but it was the worker that went, not the training that failed."""
TRY_AGAIN = frozenset({408, 425, 429})
DENIED = {
    401: "wants a token: set MINI_STUDIO_TRAINING__RAY_TOKEN to the cluster's",
    403: "does not take MINI_STUDIO_TRAINING__RAY_TOKEN: set it to the cluster's own token",
}
NOISE = re.compile(r"^(\S+ \S+\tINFO job_manager\.py:\d+ -- Runtime env is setting up\.|Running entrypoint for job )")
NEWLINE = re.compile(rb"(?<!\\)(?:\\\\)*\\n")
"""An escaped newline inside a JSON string."""


class RayCluster:
    """Implements `TrainingCluster`. `address` is Ray's dashboard, e.g. `http://127.0.0.1:8265`.

    `python` is the interpreter on the cluster's nodes and `pythonpath` the folder that holds the package `workloads` there;
    both default to this process's own, which is right for a cluster on this machine.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float,
        python: str = sys.executable,
        module: str = "workloads.train",
        pythonpath: str | None = None,
        token: str | None = None,
    ) -> None:
        self._address = address.rstrip("/")
        self._timeout_s = timeout_s
        self._program = [python, "-m", module]
        self._pythonpath = pythonpath or str(Path(specs.__file__).resolve().parents[1])
        self._client = httpx.AsyncClient(
            base_url=self._address,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=timeout_s,
            trust_env=False,
            # a restarted head leaves dead connections behind, and a submit that meets one is of unknown outcome
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    async def has_room(self, workers: Workers, *, running: int) -> bool:
        alive, usage = await self._look()
        if sum(_places(node, workers) for node in alive) < workers.count:
            raise Refused(_too_small(workers))
        resources = _resources(alive, usage)
        for name, each in (("cpu", workers.cpus), ("gpu", workers.gpus)):
            needed = workers.count * each
            # what was just submitted is in the cluster's own count only after some seconds
            used = max(resources[name]["used"] or 0.0, running * needed)
            if needed > resources[name]["total"] - used:
                return False
        return True

    async def submit(self, submission_id: str, spec_file: Path, *, workers: Workers, metadata: dict[str, str]) -> None:
        """Start the training program on `spec_file`. The same submission again is success; another one under its id is `Refused`.

        One worker is the submitted program itself. Of several, the program only starts them, and needs nothing but a place.
        """
        alone = workers.count == 1
        body: dict[str, Any] = {
            "submission_id": submission_id,
            # without `exec` the trainer is a grandchild that survives its shell, and so a killed head
            "entrypoint": "exec " + shlex.join([*self._program, str(spec_file)]),
            "runtime_env": {"env_vars": self._environment(workers.cpus)},
            "metadata": {key: str(value) for key, value in metadata.items()},
            "entrypoint_num_cpus": workers.cpus if alone else 0,
        }
        if alone and workers.gpus > 0:
            body["entrypoint_num_gpus"] = workers.gpus
        answer = await self._call("POST", "/api/jobs/", body)
        if answer.is_success:
            return
        if "already exists" in answer.text:
            await self._check_same(submission_id, body)
            return
        raise _failure(answer)

    async def report(self, submission_id: str) -> RunReport:
        answer = await self._call("GET", _job(submission_id))
        if answer.status_code == httpx.codes.NOT_FOUND and "does not exist" in answer.text:
            return RunReport(RunState.LOST, "Ray does not know this submission (any more).")
        job = _object(answer)
        state = STATES.get(job.get("status", ""))
        if state is None:
            raise Unavailable(f"Ray at {self._address} gave no status for {submission_id}: {answer.text[:200]}")
        if state is RunState.FAILED and job.get("error_type") in LOST_WORKER:
            state = RunState.LOST
        return RunReport(state, _message(job))

    async def stop(self, submission_id: str) -> None:
        """Ask it to stop: SIGTERM, 3 s, SIGKILL. A job that is still pending stops when Ray has started it, not before."""
        answer = await self._call("POST", _job(submission_id) + "/stop")
        if answer.status_code != httpx.codes.NOT_FOUND and not answer.is_success:
            raise _failure(answer)

    async def logs(self, submission_id: str, lines: int) -> list[str]:
        if lines <= 0:
            return []
        try:
            async with asyncio.timeout(self._timeout_s):
                text = await self._log_tail(submission_id)
        except (httpx.HTTPError, TimeoutError, ValueError):
            return []
        return [line for line in text.splitlines() if not NOISE.match(line)][-lines:]

    async def status(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(min(self._timeout_s, STATUS_S)):
                alive, usage = await self._look()
        except TimeoutError:
            return _away(f"Ray at {self._address} does not answer")
        except StudioError as error:
            return _away(error.message)
        return {"available": True, "reason": None, "resources": _resources(alive, usage), "nodes": len(alive)}

    def _environment(self, cpus: float) -> dict[str, str]:
        threads = str(max(1, math.ceil(cpus)))
        return {
            "PYTHONPATH": self._pythonpath,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "RAY_API_SERVER_ADDRESS": self._address,
        }

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._client.request(method, path, json=body)
        except (TimeoutError, httpx.TimeoutException):
            raise Unavailable(f"Ray at {self._address} did not answer within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise Unavailable(f"Ray at {self._address} is away: {error or type(error).__name__}") from error
        if answer.status_code in DENIED:
            raise Denied(f"Ray at {self._address} {DENIED[answer.status_code]}. It said: {_last_line(answer.text)}")
        return answer

    async def _check_same(self, submission_id: str, wanted: dict[str, Any]) -> None:
        """Raises `Refused` unless the job that holds the id is the one that is wanted."""
        job = _object(await self._call("GET", _job(submission_id)))
        held = job.get("metadata") or {}
        if any(held.get(key) != value for key, value in wanted["metadata"].items()):
            raise Refused(f"Ray already has another job under the submission id {submission_id}: {held}")

    async def _log_tail(self, submission_id: str) -> str:
        tail, cut = b"", False
        async for chunk in self._stream(_job(submission_id) + "/logs"):
            tail += chunk
            if len(tail) > 2 * LOG_BYTES:
                tail, cut = tail[-LOG_BYTES:], True
        if cut:
            first = NEWLINE.search(tail)
            tail = b'{"logs": "' + (tail[first.end() :] if first else b'"}')
        content = json.loads(tail)
        logs = content.get("logs") if isinstance(content, dict) else None
        return logs if isinstance(logs, str) else ""

    async def _stream(self, path: str) -> AsyncIterator[bytes]:
        async with self._client.stream("GET", path) as answer:
            if answer.is_success:
                async for chunk in answer.aiter_bytes():
                    yield chunk
            else:
                yield b"{}"

    async def _look(self) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
        """The nodes that are alive, and what is used of them."""
        try:
            nodes, usage = await asyncio.gather(self._nodes(), self._usage())
            alive = [node for node in nodes if node.get("state") == "ALIVE"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Unavailable(f"Ray at {self._address} gave an answer that makes no sense: {error!r}") from error
        if not alive:
            raise Unavailable(f"Ray at {self._address} has no node that is alive")
        return alive, usage

    async def _nodes(self) -> list[dict[str, Any]]:
        content = _object(await self._call("GET", "/api/v0/nodes"))
        return list(content["data"]["result"]["result"])

    async def _usage(self) -> dict[str, list[float]]:
        """Used and total by resource; empty in the first seconds of a cluster, before its autoscaler has reported."""
        content = _object(await self._call("GET", "/api/cluster_status"))
        status = content["data"].get("clusterStatus") or {}
        usage = (status.get("loadMetricsReport") or {}).get("usage") or {}
        return {name: value for name, value in usage.items() if isinstance(value, list) and len(value) == 2}


def _job(submission_id: str) -> str:
    return f"/api/jobs/{quote(submission_id, safe='')}"


def _object(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object of a good answer. Anything else is `Unavailable`: reading may work later."""
    if answer.is_success:
        with contextlib.suppress(ValueError):
            content = answer.json()
            if isinstance(content, dict):
                return content
    raise Unavailable(f"Ray answered {answer.status_code} to {answer.request.url}: {_last_line(answer.text)}")


def _failure(answer: httpx.Response) -> StudioError:
    text = f"Ray answered {answer.status_code}: {_last_line(answer.text)}"
    permanent = answer.is_client_error and answer.status_code not in TRY_AGAIN
    return Refused(text) if permanent else Unavailable(text)


def _last_line(text: str) -> str:
    """Ray answers with tracebacks; what matters stands at their end."""
    lines = [line for line in text.splitlines() if line.strip(" .")]
    return lines[-1].strip()[:500] if lines else "nothing"


def _message(job: dict[str, Any]) -> str:
    """One sentence. Never Ray's own message for a trainer that exited: it repeats log lines, which must not be taken for causes."""
    code = job.get("driver_exit_code")
    if job.get("status") == "FAILED" and isinstance(code, int):
        by = " (SIGKILL: out of memory, or killed by hand)" if code in (-9, 137) else ""
        return f"The training process ended with exit code {code}{by}."
    message = str(job.get("message") or "")
    return message.splitlines()[0][:500] if message else ""


def _away(reason: str) -> dict[str, Any]:
    return {"available": False, "reason": reason, "resources": {}, "nodes": 0}


def _places(node: dict[str, Any], workers: Workers) -> int:
    """How many of the workers an empty node holds."""
    total = node.get("resources_total") or {}
    needs = [(name, need) for name, need in (("CPU", workers.cpus), ("GPU", workers.gpus)) if need > 0]
    return min(int(float(total.get(name, 0.0)) / need) for name, need in needs)


def _too_small(workers: Workers) -> str:
    gpus = f" and {workers.gpus:g} GPUs" if workers.gpus else ""
    return (
        f"The Ray cluster has no room for {workers.count} workers with {workers.cpus:g} CPUs{gpus} each, even when nothing runs on it. "
        "Add nodes, or lower MINI_STUDIO_TRAINING__WORKERS, __CPUS or __GPUS; the job waits until then."
    )


def _resources(alive: list[dict[str, Any]], usage: dict[str, list[float]]) -> dict[str, Any]:
    """`{"cpu": {"total", "used"}, "gpu": ..., "memory_bytes": ...}`; `used` is null until Ray has reported it."""

    def one(name: str) -> dict[str, float | None]:
        total = sum(float((node.get("resources_total") or {}).get(name, 0.0)) for node in alive)
        used = float(usage[name][0]) if name in usage else (None if total else 0.0)
        return {"total": total, "used": used}

    return {"cpu": one("CPU"), "gpu": one("GPU"), "memory_bytes": one("memory")}
