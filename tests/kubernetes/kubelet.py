"""A node for tests whose pods are real processes: the model servers run on this machine, each on its pod's own address.

`python -m tests.kubernetes.kubelet API NODE CIDR FOLDER` registers the node with the API server at API (plain HTTP, as `kubectl proxy`
gives it) and owns its pods as a kubelet does: it starts them, probes them over HTTP, restarts what dies with growing pauses, and lets
them go with their preStop pause, SIGTERM and grace period. Of a pod it takes the first container's arguments, for `workloads.serve`, its
variables, empty volumes, probes and preStop sleep. It takes no images, limits or users: those need a container runtime.
The addresses of CIDR (an IPv4 /24) have to be this machine's: `ip route add local CIDR dev lo`.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

LEASE_S = 10
WATCH_S = 30
RESTART_PAUSES_S = (0, 0, 10, 20, 40, 80, 160, 300)
"""Before the first start, the second one, and so on."""
Object = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Api:
    """The calls that a kubelet makes."""

    def __init__(self, url: str, node: str) -> None:
        self.node = node
        self._client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=10)

    async def register(self) -> None:
        """The node, ready, with more of everything than tests ask for."""
        capacity = {"cpu": "64", "memory": "512Gi", "pods": "500", "ephemeral-storage": "1Ti", "nvidia.com/gpu": "8"}
        labels = {"kubernetes.io/hostname": self.node, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self.node, "labels": labels}}
        await self._client.post("/api/v1/nodes", json=node)
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}
        status = {"capacity": capacity, "allocatable": capacity, "conditions": [{**ready, "lastTransitionTime": now()}]}
        await self._patch(f"/api/v1/nodes/{self.node}/status", {"status": status})

    async def renew(self) -> None:
        """Say, until cancelled, that the node lives."""
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        while True:
            spec = {"holderIdentity": self.node, "leaseDurationSeconds": 40}
            spec["renewTime"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self.node}}
            with contextlib.suppress(httpx.HTTPError):
                await self._client.post(leases, json={**lease, "spec": spec})
                await self._patch(f"{leases}/{self.node}", {"spec": spec})
            await asyncio.sleep(LEASE_S)

    async def pods(self) -> Any:
        """All pods of the node, and then their changes; a watch from nowhere begins with what there is."""
        query = {"watch": "1", "fieldSelector": f"spec.nodeName={self.node}", "timeoutSeconds": WATCH_S}
        while True:
            with contextlib.suppress(httpx.HTTPError):
                async with self._client.stream("GET", "/api/v1/pods", params=query, timeout=WATCH_S + 10) as events:
                    async for line in events.aiter_lines():
                        event = json.loads(line)
                        if event["type"] in ("ADDED", "MODIFIED"):
                            yield event["object"]
            await asyncio.sleep(0.2)

    async def report(self, pod: Object, status: Object) -> None:
        """The pod's status, tried again until the API server has it or the pod is gone."""
        await self._until_done("PATCH", f"{_path(pod)}/status", {"metadata": _same(pod), "status": status})

    async def delete(self, pod: Object) -> None:
        await self._until_done("DELETE", _path(pod), {"gracePeriodSeconds": 0, "preconditions": _same(pod)})

    async def _until_done(self, method: str, path: str, body: Object) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = await self._send(method, path, body)
                if answer.status_code < 500:  # 404, 409: the pod has gone
                    return
            await asyncio.sleep(0.5)

    async def _patch(self, path: str, body: Object) -> None:
        (await self._send("PATCH", path, body)).raise_for_status()

    async def _send(self, method: str, path: str, body: Object) -> httpx.Response:
        headers = {"Content-Type": "application/merge-patch+json" if method == "PATCH" else "application/json"}
        return await self._client.request(method, path, content=json.dumps(body), headers=headers)


def _path(pod: Object) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _same(pod: Object) -> Object:
    return {"uid": pod["metadata"]["uid"]}


class Pod:
    """One pod: its process, and what is said of it."""

    def __init__(self, pod: Object, address: str, folder: Path, api: Api) -> None:
        self.ending = asyncio.Event()
        self._pod, self._address, self._folder, self._api = pod, address, folder, api
        self._container: Object = pod["spec"]["containers"][0]
        self._process: asyncio.subprocess.Process
        self._begun = now()
        self._restarts = 0
        self._last: Object = {}
        self._ready = False

    async def live(self) -> None:
        """Run it until it was told to go and is gone."""
        ending = asyncio.create_task(self.ending.wait())
        for pause_s in itertools.chain(RESTART_PAUSES_S, itertools.repeat(RESTART_PAUSES_S[-1])):
            if pause_s:
                crashed = {"reason": "CrashLoopBackOff", "message": f"back-off {pause_s}s restarting failed container"}
                await self._say({"waiting": crashed})
                await asyncio.wait([ending], timeout=pause_s)
            if ending.done():
                break
            await self._run(ending)
            self._restarts += 1
        await self._api.delete(self._pod)

    async def _run(self, ending: "asyncio.Task[Any]") -> None:
        """One life of its process."""
        started = now()
        await self._start()
        await self._say({"running": {"startedAt": started}})
        exited, probing = asyncio.create_task(self._process.wait()), asyncio.create_task(self._probe(started))
        await asyncio.wait([exited, ending], return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():
            await self._let_go(exited)
        probing.cancel()
        code, reason = await exited, "Completed" if await exited == 0 else "Error"
        self._last = {
            "terminated": {"exitCode": abs(code), "reason": reason, "startedAt": started, "finishedAt": now()}
        }
        await self._say(self._last)

    async def _start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        variables = {part["name"]: part["value"] for part in self._container.get("env", ()) if "value" in part}
        arguments = [f"--host={self._address}" if a.startswith("--host=") else a for a in self._container["args"]]
        command = [sys.executable, "-m", "workloads.serve", *map(self._placed, arguments)]
        own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
        environment = own | {name: self._placed(value) for name, value in variables.items()}
        with (self._folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def _placed(self, text: str) -> str:
        """An argument or variable as it is here, if it names a path in an empty volume: that is a folder of the pod's."""
        empty = {volume["name"] for volume in self._pod["spec"].get("volumes", ()) if "emptyDir" in volume}
        option, equals, path = text.partition("=") if text.startswith("--") else ("", "", text)
        inside = [m for m in self._container.get("volumeMounts", ()) if f"{path}/".startswith(f"{m['mountPath']}/")]
        mount = max(inside, key=lambda mount: len(mount["mountPath"]), default=None)
        if mount is None or mount["name"] not in empty:
            return text
        own = self._folder / mount["name"]
        own.mkdir(exist_ok=True)
        return f"{option}{equals}{own}{path.removeprefix(mount['mountPath'])}"

    async def _let_go(self, exited: "asyncio.Task[int]") -> None:
        """preStop pause, SIGTERM, and SIGKILL when the grace period is over. It may answer until the end."""
        deadline = time.monotonic() + self._pod["metadata"].get("deletionGracePeriodSeconds", 30)
        pause_s = self._container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        await asyncio.wait([exited], timeout=pause_s)
        for signum, patience_s in ((signal.SIGTERM, max(0.0, deadline - time.monotonic())), (signal.SIGKILL, None)):
            if not exited.done():
                self._process.send_signal(signum)
                await asyncio.wait([exited], timeout=patience_s)

    def follows(self, pod: Object) -> None:
        """What the API server says of it now."""
        if "deletionTimestamp" in pod["metadata"]:
            self._pod = pod
            self.ending.set()

    async def _probe(self, started: str) -> None:
        """Startup first; then readiness, which is reported, and liveness, which ends the process."""
        probes = {name: self._container.get(f"{name}Probe") for name in ("startup", "readiness", "liveness")}
        if probes["startup"] and not await self._passes(probes["startup"]):
            self._process.kill()
            return
        running = {"running": {"startedAt": started}}
        await asyncio.gather(
            self._follow_readiness(probes["readiness"], running), self._follow_liveness(probes["liveness"])
        )

    async def _passes(self, probe: Object) -> bool:
        for _ in range(probe.get("failureThreshold", 3)):
            if await self._answers(probe):
                return True
            await asyncio.sleep(probe.get("periodSeconds", 10))
        return False

    async def _follow_readiness(self, probe: Object | None, running: Object) -> None:
        failures = 0
        while True:
            failures = 0 if probe is None or await self._answers(probe) else failures + 1
            ready = not failures or (self._ready and failures < (probe or {}).get("failureThreshold", 3))
            if ready != self._ready:
                await self._say(running, ready=ready)
            await asyncio.sleep((probe or {}).get("periodSeconds", 10))

    async def _follow_liveness(self, probe: Object | None) -> None:
        while probe and await self._passes(probe):
            await asyncio.sleep(probe.get("periodSeconds", 10))
        if probe:
            self._process.kill()

    async def _answers(self, probe: Object) -> bool:
        get = probe["httpGet"]
        ports = {port.get("name"): port["containerPort"] for port in self._container.get("ports", ())}
        url = f"http://{self._address}:{ports.get(get['port'], get['port'])}{get.get('path', '/')}"
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=probe.get("timeoutSeconds", 1)) as client:
                return (await client.get(url)).is_success
        except httpx.HTTPError:
            return False

    async def _say(self, state: Object, *, ready: bool = False) -> None:
        self._ready = ready
        truth = {True: "True", False: "False"}
        conditions = {"PodScheduled": True, "Initialized": True, "ContainersReady": ready, "Ready": ready}
        container = {
            "name": self._container["name"], "image": self._container["image"], "imageID": "", "state": state,
            "lastState": self._last if "terminated" not in state else {}, "ready": ready, "started": ready,
            "restartCount": self._restarts,
        }  # fmt: skip
        await self._api.report(self._pod, {
            "phase": "Running",
            "conditions": [{"type": t, "status": truth[v], "lastTransitionTime": now()} for t, v in conditions.items()],
            "containerStatuses": [container],
            "podIP": self._address, "podIPs": [{"ip": self._address}], "hostIP": "127.0.0.1", "startTime": self._begun,
        })  # fmt: skip

    def kill(self) -> None:
        with contextlib.suppress(AttributeError, ProcessLookupError):
            self._process.kill()


async def keep(url: str, node: str, cidr: str, folder: Path) -> None:
    """Be the node until SIGTERM; then its processes end at once, as in a power cut."""
    api, pods, tasks = Api(url, node), dict[str, Pod](), set[asyncio.Task[Any]]()
    prefix, numbers = cidr.rpartition(".")[0], itertools.cycle(range(1, 255))

    def begin(work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)  # one that failed says so when nobody keeps it

    async def follow() -> None:
        async for pod in api.pods():
            uid = pod["metadata"]["uid"]
            if uid not in pods:
                name = f"{pod['metadata']['name']}-{uid[:8]}"
                pods[uid] = Pod(pod, f"{prefix}.{next(numbers)}", folder / name, api)
                begin(pods[uid].live())
            pods[uid].follows(pod)

    await api.register()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    begin(api.renew())
    begin(follow())
    print("the node is ready", flush=True)
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for pod in pods.values():
        pod.kill()


if __name__ == "__main__":
    asyncio.run(keep(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])))
