"""The Kubernetes API in JSON: the only module that knows the `kubernetes` package.

Every call ends within the settings' timeout, a few run at once, and what fails raises the studio's errors:

- 404 is None, or nothing to do; 409 is `Conflict`: whoever called looks again;
- 400, 403, 422 and a kind that the cluster does not have are `Refused`, with the server's message (a missing right after some tries);
- 401 (a token that expired), 429, 5xx and a server that is away are `Unavailable`, after some tries with growing pauses.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
import structlog
from kubernetes.aio import client, config
from kubernetes.utils.quantity import parse_quantity

from mini_studio.errors import Conflict, Refused, Unavailable
from mini_studio.settings import Kubernetes

log = structlog.get_logger(__name__)

Object = dict[str, Any]

FIELD_MANAGER = "mini-studio"
PAGE = 200
TRIES = 4
PAUSE_S = 0.2
"""Before the second try; doubled before each further one."""
LONGEST_PAUSE_S = 5.0
WATCH_S = 25
"""A watch ends and is resumed so often, so a connection that has silently died is noticed."""
TOO_OLD = HTTPStatus.GONE
TRY_AGAIN = frozenset((HTTPStatus.TOO_MANY_REQUESTS, *range(500, 600)))
ADMISSION = ("exceeded quota", "admission webhook", "violates PodSecurity", "denied request", "denied the request")
"""What a 403 says that does not come from a missing right."""
MALFORMED = ("failed to create typed patch object", "quantities must match")
"""What a 500 says that is the manifest's fault."""
WARMING_UP = "allocator not ready"
"""What a 422 says of a Service that an API server was asked for too soon after its start."""
FOR_GOOD = frozenset((HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN, HTTPStatus.UNPROCESSABLE_ENTITY))


@dataclass(frozen=True)
class Kind:
    """One kind of namespaced object."""

    api_version: str
    name: str
    plural: str

    def path(self, namespace: str, name: str = "") -> str:
        root = f"/apis/{self.api_version}" if "/" in self.api_version else f"/api/{self.api_version}"
        return f"{root}/namespaces/{namespace}/{self.plural}" + (f"/{name}" if name else "")


CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SERVICE = Kind("v1", "Service", "services")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
SCALED_OBJECT = Kind("keda.sh/v1alpha1", "ScaledObject", "scaledobjects")
POD = Kind("v1", "Pod", "pods")


class Forbidden(Refused):
    """No right to do this, perhaps only because an API server that was just started has not read the roles yet."""


class TooOld(Exception):
    """The server has forgotten the version that a watch was to go on from: list again."""


class KubeApi:
    """A client of one cluster and one namespace. Opened on first use; after a 401 its token is read anew."""

    def __init__(self, settings: Kubernetes) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.max_requests)
        self._opening = asyncio.Lock()
        self._client: client.ApiClient | None = None
        self._expired = False
        self.calls = 0
        """Requests sent, watches included; for benchmarks."""

    async def get(self, kind: Kind, name: str) -> Object | None:
        status, answer = await self._call("GET", kind.path(self._settings.namespace, name))
        return None if status == HTTPStatus.NOT_FOUND else answer

    async def apply(self, kind: Kind, manifest: Object, *, force: bool, dry_run: bool = False) -> Object:
        """Server-side apply. A `resourceVersion` in the manifest must be the present one, else `Conflict`."""
        query = {"fieldManager": FIELD_MANAGER, "force": str(force).lower()} | ({"dryRun": "All"} if dry_run else {})
        path = kind.path(self._settings.namespace, manifest["metadata"]["name"])
        status, answer = await self._call("PATCH", path, query, manifest)
        if status == HTTPStatus.NOT_FOUND:
            raise Refused(
                f"{kind.name} cannot be applied: {_said(answer)}; check that the namespace {self._settings.namespace} exists"
                + (" and that KEDA is installed" if kind is SCALED_OBJECT else "")
            )
        return answer

    async def delete(self, kind: Kind, name: str, *, uid: str, version: str) -> None:
        """Delete this very object, with what belongs to it; one that is gone is fine. `Conflict` when it has changed since."""
        body = {
            "preconditions": {"uid": uid, "resourceVersion": version},
            "propagationPolicy": "Foreground" if kind is DEPLOYMENT else "Background",
        }
        await self._call("DELETE", kind.path(self._settings.namespace, name), {}, body)

    async def list(self, kind: Kind, selector: str) -> tuple[list[Object], str]:
        """All objects with these labels, read in pages, and the version of the list, to watch from. Raises `TooOld`."""
        found: list[Object] = []
        query = {"labelSelector": selector, "limit": str(PAGE)}
        while True:
            status, page = await self._call("GET", kind.path(self._settings.namespace), query)
            if status == TOO_OLD:
                raise TooOld
            if status == HTTPStatus.NOT_FOUND:
                raise Refused(f"the cluster has no {kind.plural} ({kind.api_version}); install what defines them")
            found += page["items"]
            if not (token := page["metadata"].get("continue")):
                return found, page["metadata"]["resourceVersion"]
            query["continue"] = token

    async def watch(self, kind: Kind, selector: str, version: str) -> AsyncIterator[tuple[str, Object]]:
        """Events (`ADDED`, `MODIFIED`, `DELETED`, `BOOKMARK`) from behind `version` on, until the server ends it. Raises `TooOld`."""
        query = {
            "watch": "1",
            "labelSelector": selector,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_S),
        }
        patience = aiohttp.ClientTimeout(
            total=None, sock_connect=self._settings.request_timeout_s, sock_read=WATCH_S + 10
        )
        async with self._response("GET", kind.path(self._settings.namespace), query, None, patience) as response:
            if response.status != HTTPStatus.OK:
                self._judge(response.status, await _body(response))
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    self._judge(event["object"].get("code", 500), event["object"])
                yield event["type"], event["object"]

    async def aclose(self) -> None:
        async with self._opening:
            if self._client is not None:
                await self._client.close()
                self._client = None

    async def _call(
        self, method: str, path: str, query: Mapping[str, str] | None = None, body: Object | None = None
    ) -> tuple[int, Object]:
        """Status and body of an answer that the caller can do something with: success, 404 or 410."""
        pause_s, begun = PAUSE_S, time.monotonic()
        for left in reversed(range(TRIES)):
            try:
                return await self._try(method, path, query or {}, body)
            except (Unavailable, Forbidden) as error:
                if not left or time.monotonic() - begun > self._settings.request_timeout_s:
                    raise
                log.info("kubernetes.trying_again", reason=error.message)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise AssertionError("unreachable")

    async def _try(self, method: str, path: str, query: Mapping[str, str], body: Object | None) -> tuple[int, Object]:
        patience = aiohttp.ClientTimeout(total=self._settings.request_timeout_s)
        async with self._slots, self._response(method, path, query, body, patience) as response:
            answer = await _body(response)
            if response.status >= HTTPStatus.BAD_REQUEST and response.status not in (HTTPStatus.NOT_FOUND, TOO_OLD):
                self._judge(response.status, answer)
            return response.status, answer

    def _judge(self, status: int, answer: Object) -> None:
        """Raise what the answer means."""
        said = _said(answer)
        if status == TOO_OLD:
            raise TooOld
        if status == HTTPStatus.UNAUTHORIZED:
            self._expired = True
            raise Unavailable(f"Kubernetes does not accept the studio's credentials: {said}")
        if status == HTTPStatus.CONFLICT:
            raise Conflict(f"Kubernetes: {said}")
        if status == HTTPStatus.FORBIDDEN and not any(sign in said for sign in ADMISSION):
            raise Forbidden(f"Kubernetes: {said}")
        if WARMING_UP in said:
            raise Unavailable(f"Kubernetes is starting: {said}")
        if status in FOR_GOOD or status not in TRY_AGAIN or any(sign in said for sign in MALFORMED):
            raise Refused(f"Kubernetes: {said}")
        raise Unavailable(f"Kubernetes cannot do this now: {said}")

    @asynccontextmanager
    async def _response(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Object | None,
        patience: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request. What keeps it from being answered is `Unavailable`."""
        headers = {"Accept": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = "application/apply-patch+yaml"
        self.calls += 1
        try:
            opened = await self._opened()
            request = await opened.param_serialize(
                method, path, query_params=list(query.items()), header_params=headers, body=body,
                auth_settings=["BearerToken"],
            )  # fmt: skip
            answer = await opened.call_api(*request, _request_timeout=patience, _preload_content=False)
            async with answer.response as response:
                yield response
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(f"the Kubernetes API server is away: {error or type(error).__name__}") from error

    async def _opened(self) -> client.ApiClient:
        async with self._opening:
            if self._client is None:
                self._client = client.ApiClient(await _configuration(self._settings))
            elif self._expired:
                # In place: a client that is closed under a watch leaves it waiting for what never comes.
                self._client.configuration.api_key = (await _configuration(self._settings)).api_key
            self._expired = False
            return self._client


async def _configuration(settings: Kubernetes) -> client.Configuration:
    """Where the cluster is and who we are there: the file that the settings name, the pod's service account, or the usual file."""
    wanted = client.Configuration()
    try:
        if settings.kubeconfig is not None:
            await config.load_kube_config(str(settings.kubeconfig), client_configuration=wanted, persist_config=False)
        else:
            try:
                config.load_incluster_config(client_configuration=wanted)
            except config.ConfigException:
                await config.load_kube_config(client_configuration=wanted, persist_config=False)
    except (config.ConfigException, OSError) as error:
        raise Unavailable(
            f"no way to a Kubernetes cluster: {error}; give the pod a service account, "
            "or name a file by MINI_STUDIO_SERVING__KUBERNETES__KUBECONFIG"
        ) from error
    wanted.connection_pool_maxsize = 0  # watches hold theirs; `_slots` bounds the others
    return wanted


async def _body(response: aiohttp.ClientResponse) -> Object:
    text = await response.read()
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {"message": text[:500].decode(errors="replace").strip()}


def _said(answer: Object) -> str:
    return str(answer.get("message") or answer.get("reason") or "no reason given")


def same_quantity(one: Any, other: Any) -> bool:
    """Whether two texts are one amount: the server writes `0.5` as `500m`."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    try:
        return bool(parse_quantity(one) == parse_quantity(other))
    except ValueError:
        return False
