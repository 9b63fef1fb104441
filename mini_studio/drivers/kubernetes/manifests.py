"""The objects of one release, as they are applied: pure functions of the release and the settings.

Every object has the release's name, the labels that list it, and the full ids in annotations, which are compared before it is touched.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mini_studio.drivers.kubernetes.api import (
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    NETWORK_POLICY,
    SCALED_OBJECT,
    SERVICE,
    Kind,
    Object,
    same_quantity,
)
from mini_studio.drivers.kubernetes.arguments import CACHE, predict_source, studio_arguments, vllm_arguments
from mini_studio.drivers.ports import ReleaseSpec
from mini_studio.settings import Kubernetes

KINDS = (CONFIG_MAP, SERVICE, NETWORK_POLICY, DISRUPTION_BUDGET, DEPLOYMENT, SCALED_OBJECT)
"""In the order in which they are applied: the Deployment when all that its pods need is there, what scales it last."""
LABELS = {"app.kubernetes.io/managed-by": "mini-studio", "app.kubernetes.io/component": "model-server"}
SELECTOR = ",".join(f"{name}={value}" for name, value in LABELS.items())
RELEASE = "mini-studio.io/release"
"""Label: the release's name. The pods of a release are found by it."""
DEPLOYMENT_ID, GENERATION = "mini-studio.io/deployment-id", "mini-studio.io/generation"
CLIENT_CODE, MODEL = "mini-studio.io/client-code", "mini-studio.io/model"
PREDICT = "mini-studio.io/predict"
WEIGHTS = "mini-studio.io/weights"
"""Annotation: the real folder that a release serves, so that every process, and every restart, means the same one."""
MANIFEST = "mini-studio.io/manifest"
"""Annotation: a hash of what was applied. Without it what is not wanted any more would stay."""
CONTENT = "mini-studio.io/content"
"""Annotation of pods and of their template: a hash that tells the pods of the present template from older ones."""
PORT = 8000
USER = 10001
"""Not root, and nobody's: the models root has to be readable for all, or for this group."""
MIDDLEWARE_FOLDER = "/opt/mini-studio"
DRAIN_S = 5
"""A pod goes on answering so long after it was told to go, until every gateway and proxy has taken note."""
GRACE_S = 330
"""Longest answer that a pod may finish: as long as a gateway waits for one (`gateway.first_byte_s`), and the drain."""
MAX_STABILIZATION_S = 3600


@dataclass(frozen=True)
class Content:
    """What a release's pods need of this machine's files. `weights` is their folder, the same path in the pod."""

    models_root: str
    weights: str | None
    """None: a model of the hub, which the server fetches itself."""


def manifests(
    spec: ReleaseSpec, content: Content, settings: Kubernetes, *, patience_s: float
) -> list[tuple[Kind, Object]]:
    """One of each of `KINDS`, in that order. Raises `Refused` for what must not become an argument."""
    parts: list[Object] = [
        {"data": {"predict.py": predict_source()}},
        {"spec": _service(spec)},
        {"spec": _network_policy(spec, content, settings)},
        {"spec": _disruption_budget(spec)},
        {"spec": _deployment(spec, content, settings, patience_s)},
        {"spec": _scaled_object(spec, settings, patience_s)},
    ]
    objects = [(kind, _object(kind, spec, part)) for kind, part in zip(KINDS, parts, strict=True)]
    dict(objects)[DEPLOYMENT]["metadata"]["annotations"][WEIGHTS] = content.weights or ""
    return objects if settings.runtime == "vllm" else objects[1:]  # the studio's own server answers /predict itself


def _object(kind: Kind, spec: ReleaseSpec, part: Object) -> Object:
    about = {**annotations(spec), MANIFEST: _hash(part)}
    metadata = {"name": spec.name, "labels": labels(spec), "annotations": about}
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **part}


def _hash(part: Object | str) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]


def labels(spec: ReleaseSpec) -> dict[str, str]:
    return {**LABELS, RELEASE: spec.name}


def annotations(spec: ReleaseSpec) -> dict[str, str]:
    return {
        DEPLOYMENT_ID: spec.deployment_id,
        GENERATION: str(spec.generation),
        CLIENT_CODE: spec.client_code,
        MODEL: spec.model,
    }


def annotation(of: Object, name: str) -> str:
    """One of an object's annotations; empty where it has none."""
    return str(of["metadata"].get("annotations", {}).get(name, ""))


def _service(spec: ReleaseSpec) -> Object:
    ports = [{"name": "http", "port": PORT, "protocol": "TCP", "targetPort": "http"}]
    return {"type": "ClusterIP", "selector": {RELEASE: spec.name}, "ports": ports}


def _disruption_budget(spec: ReleaseSpec) -> Object:
    """One pod at a time: a minimum would never let the only replica's node be drained."""
    return {
        "maxUnavailable": 1,
        "selector": {"matchLabels": {RELEASE: spec.name}},
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }


def _network_policy(spec: ReleaseSpec, content: Content, settings: Kubernetes) -> Object:
    gateway = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.gateway_namespace}},
        "podSelector": {"matchLabels": settings.gateway_labels},
    }
    egress: list[Object] = [{"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}]
    if content.weights is None and settings.hub_egress:
        ranges = [{"ipBlock": {"cidr": cidr}} for cidr in settings.hub_egress]
        egress.append({"to": ranges, "ports": [{"port": 443, "protocol": "TCP"}]})
    return {
        "podSelector": {"matchLabels": {RELEASE: spec.name}},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [gateway], "ports": [{"port": PORT, "protocol": "TCP"}]}],
        "egress": egress,
    }


def _scaled_object(spec: ReleaseSpec, settings: Kubernetes, patience_s: float) -> Object:
    """Replicas follow what the gateways hold and forward. An empty answer counts as 0; without Prometheus there are `fallback` ones."""
    trigger = {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": settings.prometheus,
            "query": f'sum(mini_studio_gateway_requests{{deployment="{spec.name}"}})',
            "threshold": f"{spec.prometheus_threshold:g}",
            "activationThreshold": "0",
        },
    }
    least, most = spec.min_replicas, max(1, spec.min_replicas, spec.max_replicas)
    window = {"stabilizationWindowSeconds": min(settings.scale_down_s, MAX_STABILIZATION_S)}
    return {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": spec.name},
        "minReplicaCount": least,
        "maxReplicaCount": most,
        "pollingInterval": settings.scale_poll_s,
        "cooldownPeriod": settings.scale_down_s,
        # Not before it can have become ready once: what has never answered must not count as asleep.
        "initialCooldownPeriod": max(settings.scale_down_s, int(patience_s)),
        "fallback": {"failureThreshold": 3, "replicas": max(1, least)},
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": {"scaleDown": window}}},
        "triggers": [trigger],
    }


def _deployment(spec: ReleaseSpec, content: Content, settings: Kubernetes, patience_s: float) -> Object:
    """Without `replicas`: those are the autoscaler's. New pods come before old ones go."""
    pod = _pod(spec, content, settings, patience_s)
    about = {
        DEPLOYMENT_ID: spec.deployment_id,
        MODEL: spec.model,
        PREDICT: _hash(predict_source()),
        CONTENT: _hash(pod),
    }
    return {
        "progressDeadlineSeconds": int(patience_s),
        "revisionHistoryLimit": 1,
        "selector": {"matchLabels": {RELEASE: spec.name}},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {
            "metadata": {"labels": labels(spec), "annotations": about},
            "spec": pod,
        },
    }


def _pod(spec: ReleaseSpec, content: Content, settings: Kubernetes, patience_s: float) -> Object:
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, content, settings, patience_s)],
        "volumes": _volumes(spec, content, settings),
    }
    if settings.node_selector:
        pod["nodeSelector"] = settings.node_selector
    if settings.tolerations:
        pod["tolerations"] = settings.tolerations
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return pod


def _container(spec: ReleaseSpec, content: Content, settings: Kubernetes, patience_s: float) -> Object:
    vllm = settings.runtime == "vllm"
    if vllm:
        # `serve` takes the model as its first argument; another entrypoint that an image might have does not
        arguments = vllm_arguments(spec, content.weights)
        started = {"image": settings.vllm_image, "command": ["vllm", "serve"], "args": arguments}
    else:
        arguments = studio_arguments(spec, settings, content.weights, content.models_root)
        started = {"image": settings.server_image, "args": arguments}
    limits = {"memory": settings.memory, **({settings.gpu_resource: str(spec.gpu_count)} if spec.gpu_count else {})}
    health = {"httpGet": {"path": "/health", "port": "http", "scheme": "HTTP"}}
    return {
        "name": "server",
        **started,
        "env": [{"name": name, "value": value} for name, value in _environment(content, vllm=vllm).items()],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": settings.cpu, **limits}, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "startupProbe": {
            **health,
            "periodSeconds": 2,
            "timeoutSeconds": 5,
            "failureThreshold": max(1, int(patience_s / 2)),
        },
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "lifecycle": {"preStop": {"sleep": {"seconds": DRAIN_S}}},
        "volumeMounts": _mounts(content, settings),
    }


def _environment(content: Content, *, vllm: bool) -> dict[str, str]:
    """Nothing is written outside the cache and /tmp, and only servers of hub models look for the hub."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} if content.weights else {}
    middleware = {"PYTHONPATH": MIDDLEWARE_FOLDER, "VLLM_NO_USAGE_STATS": "1"} if vllm else {}
    return {
        "HOME": CACHE,
        "USER": "model-server",
        "XDG_CACHE_HOME": CACHE,
        "HF_HOME": f"{CACHE}/huggingface",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **middleware,
        **offline,
    }


def _volumes(spec: ReleaseSpec, content: Content, settings: Kubernetes) -> list[Object]:
    shared = content.weights is None and settings.cache_claim is not None
    own: Object = {"emptyDir": {"sizeLimit": settings.cache_size}}
    cache: Object = {"persistentVolumeClaim": {"claimName": settings.cache_claim}} if shared else own
    volumes: list[Object] = [
        {"name": "cache", **cache},
        {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.memory}},
    ]
    if content.weights is not None:
        volumes.append(
            {"name": "models", "persistentVolumeClaim": {"claimName": settings.models_claim, "readOnly": True}}
        )
    if settings.runtime == "vllm":
        volumes.append({"name": "predict", "configMap": {"name": spec.name}})
    return volumes


def _mounts(content: Content, settings: Kubernetes) -> list[Object]:
    mounts: list[Object] = [
        {"name": "cache", "mountPath": CACHE},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    if content.weights is not None:
        mounts.append({"name": "models", "mountPath": content.models_root, "readOnly": True})
    if settings.runtime == "vllm":
        mounts.append({"name": "predict", "mountPath": MIDDLEWARE_FOLDER, "readOnly": True})
    return mounts


def covers(live: Any, wanted: Any) -> bool:
    """Whether a live object has all that was applied; what others added to it does not matter, nor that the server drops what is empty.

    Lists of named parts (containers, ports, volumes ...) are compared by name, other lists as they are.
    """
    if live is None:
        return wanted in ({}, [], "", None)
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(covers(live.get(name), value) for name, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(live, list):
            return False
        if all(isinstance(part, dict) and "name" in part for part in wanted):
            named = {part.get("name"): part for part in live if isinstance(part, dict)}
            return all(covers(named.get(part["name"]), part) for part in wanted)
        return len(live) == len(wanted) and all(map(covers, live, wanted))
    return bool(live == wanted) or same_quantity(live, wanted)
