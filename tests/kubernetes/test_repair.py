"""What the reconciler does about drift, foreign objects and pods that cannot run, on a real control plane."""

import asyncio
import json

import pytest

from consumers.watchers import serving
from events.types import DeploymentStatus
from mini_studio.drivers.kubernetes.driver import KubernetesDriver
from mini_studio.drivers.ports import ReleaseState
from mini_studio.records.releases import Release
from tests.kubernetes.reconciling import Reconciled

pytestmark = pytest.mark.real

PARTS = ("service", "networkpolicy", "poddisruptionbudget", "deployment", "scaledobject")


async def test_deployed_and_undeployed(reconciled: Reconciled) -> None:
    id = await reconciled.deploy()
    release = await reconciled.becomes(id, DeploymentStatus.READY)
    name = release.request.name
    assert release.endpoints == [f"http://{name}.{reconciled.namespace}.svc:8000"]
    assert await reconciled.events(id) == ["applied", "ready"]
    there = reconciled.objects()
    assert {
        f"{kind}/{name}" for kind in ("Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget", "ScaledObject")
    } <= there
    await reconciled.undeploy(id)
    await reconciled.becomes(id, DeploymentStatus.REMOVED, 60)
    assert await reconciled.events(id) == ["applied", "ready", "removed"]
    for _ in range(100):
        if not (left := reconciled.objects()):
            break
        await asyncio.sleep(0.2)
    assert left == set()


@pytest.mark.parametrize("part", PARTS)
async def test_what_is_deleted_by_hand_comes_back(reconciled: Reconciled, part: str) -> None:
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    name = await reconciled.name(id)
    before = json.loads(reconciled.kubectl("get", part, name, "-o", "json"))["metadata"]["uid"]
    reconciled.kubectl("delete", part, name)
    for _ in range(300):
        found = reconciled.kubectl("get", part, name, "-o", "json", "--ignore-not-found")
        if found and json.loads(found)["metadata"]["uid"] != before:
            break
        await asyncio.sleep(0.1)
    assert json.loads(found)["metadata"]["annotations"]["mini-studio.io/deployment-id"] == id
    await reconciled.becomes(id, DeploymentStatus.READY)


async def test_what_is_edited_by_hand_is_put_right(reconciled: Reconciled) -> None:
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    name = await reconciled.name(id)
    edits = {
        "deployment": {"spec": {"template": {"spec": {"automountServiceAccountToken": True}}}},
        "service": {"spec": {"selector": {"mini-studio.io/release": "other"}}},
        "networkpolicy": {"spec": {"ingress": [{}]}},
        "scaledobject": {"spec": {"maxReplicaCount": 100}},
    }
    before = {part: json.loads(reconciled.kubectl("get", part, name, "-o", "json"))["spec"] for part in edits}
    for part, patch in edits.items():
        reconciled.kubectl("patch", part, name, "--type=merge", "-p", json.dumps(patch))
    for _ in range(300):
        now = {part: json.loads(reconciled.kubectl("get", part, name, "-o", "json"))["spec"] for part in edits}
        if now == before:
            break
        await asyncio.sleep(0.1)
    assert now == before
    assert (await reconciled.release(id)).status is DeploymentStatus.READY
    assert "removed" not in await reconciled.events(id)


async def test_a_release_that_is_as_it_should_be_costs_no_calls(reconciled: Reconciled) -> None:
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    name = await reconciled.name(id)
    await asyncio.sleep(1)
    before = json.loads(reconciled.kubectl("get", "deployment", name, "-o", "json"))["metadata"]["generation"]
    calls = reconciled.driver.api.calls
    await asyncio.sleep(3)
    assert reconciled.driver.api.calls == calls
    assert json.loads(reconciled.kubectl("get", "deployment", name, "-o", "json"))["metadata"]["generation"] == before


async def test_an_object_that_is_not_ours_is_left_alone(reconciled: Reconciled) -> None:
    reconciled.kubectl("create", "service", "clusterip", "vllm-base-taken", "--tcp=80")
    before = reconciled.kubectl("get", "service", "vllm-base-taken", "-o", "json")
    id = await reconciled.deploy(name="vllm-base-taken")
    release = await reconciled.becomes(id, DeploymentStatus.FAILED)
    assert release.message is not None
    assert "The Service vllm-base-taken" in release.message
    assert "is not this studio's" in release.message
    await reconciled.undeploy(id)
    await reconciled.becomes(id, DeploymentStatus.REMOVED)
    assert reconciled.kubectl("get", "service", "vllm-base-taken", "-o", "json") == before
    assert reconciled.objects() == {"Service/vllm-base-taken"}


async def test_no_node_has_so_many_gpus(reconciled: Reconciled) -> None:
    id = await reconciled.deploy(gpu_count=8)
    release = await reconciled.becomes(id, DeploymentStatus.FAILED, 40)
    assert release.message is not None
    assert "Insufficient nvidia.com/gpu" in release.message
    assert not release.settled
    assert await reconciled.events(id) == ["applied", "failed"]


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "CrashLoopBackOff"])
async def test_a_pod_that_does_not_start_is_reported_and_recovers(reconciled: Reconciled, reason: str) -> None:
    reconciled.kubectl("label", "namespace", reconciled.namespace, f"test-waiting={reason}")
    reconciled.cluster.apply(*WAITING)
    await policy_is_in_force(reconciled)
    id = await reconciled.deploy()
    release = await reconciled.becomes(id, DeploymentStatus.FAILED)
    assert release.message is not None
    assert f"does not run: {reason}" in release.message
    assert not release.settled
    reconciled.kubectl("label", "namespace", reconciled.namespace, "test-waiting-")
    await asyncio.sleep(1)  # until the policy sees that
    reconciled.kubectl("delete", "pods", "--all", "--wait=false")
    await reconciled.becomes(id, DeploymentStatus.READY)
    assert await reconciled.events(id) == ["applied", "failed", "ready"]


async def policy_is_in_force(reconciled: Reconciled) -> None:
    """A new admission policy takes a moment."""
    for _ in range(100):
        pod = reconciled.kubectl("run", "probe", "--image=x", "--dry-run=server", "-o", "json")
        if "kube-real/waiting" in json.loads(pod)["metadata"].get("annotations", {}):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the policy never came into force")


ANNOTATED = (
    'Object{metadata: Object.metadata{annotations: {"kube-real/waiting": '
    'namespaceObject.metadata.labels["test-waiting"]}}}'
)
WAITING = (
    {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": "test-waiting"},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchExpressions": [{"key": "test-waiting", "operator": "Exists"}]},
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                ],
            },
            "reinvocationPolicy": "Never",
            "mutations": [
                {
                    "patchType": "ApplyConfiguration",
                    "applyConfiguration": {"expression": ANNOTATED},
                }
            ],
        },
    },
    {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": "test-waiting"},
        "spec": {"policyName": "test-waiting"},
    },
)
"""Tells the simulated kubelet that the pods of a namespace do not start: why stands in the namespace's label."""


async def test_an_orphan_is_reported_and_left_alone(reconciled: Reconciled) -> None:
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    name = await reconciled.name(id)
    # as in a studio that has lost its records
    await reconciled.studio.store.clear(Release.COLLECTION)
    await serving.sweep(reconciled.studio)
    assert serving.ORPHANS._value.get() == 1
    assert f"Deployment/{name}" in reconciled.objects()


async def test_what_an_admission_webhook_insists_on_is_left(reconciled: Reconciled) -> None:
    reconciled.kubectl("label", "namespace", reconciled.namespace, "test-scheduler=yes")
    reconciled.cluster.apply(*INSISTING)
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    name = await reconciled.name(id)
    for _ in range(100):
        reconciled.kubectl("annotate", "deployment", name, f"test={_}", "--overwrite")
        template = json.loads(reconciled.kubectl("get", "deployment", name, "-o", "json"))["spec"]["template"]
        if template["spec"].get("enableServiceLinks"):
            break
        await asyncio.sleep(0.2)
    assert template["spec"]["enableServiceLinks"], "the policy never came into force"
    await asyncio.sleep(3)
    calls = reconciled.driver.api.calls
    await asyncio.sleep(3)
    assert reconciled.driver.api.calls == calls


async def test_another_processs_restart_with_another_image_keeps_it_ready(reconciled: Reconciled) -> None:
    """The old pods serve on until the new ones do."""
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    reconciled.kubectl("label", "namespace", reconciled.namespace, "test-waiting=ImagePullBackOff")
    reconciled.cluster.apply(*WAITING)
    await policy_is_in_force(reconciled)
    release = await reconciled.release(id)
    settings = reconciled.studio.settings.serving
    other = settings.kubernetes.model_copy(update={"server_image": "mini-studio-server:none"})
    restarted = KubernetesDriver(reconciled.studio.settings.models, settings.model_copy(update={"kubernetes": other}))
    await restarted.apply(serving.spec(release))
    for _ in range(20):
        seen = await restarted.observe(release.request.name)
        assert seen is not None
        assert (seen.state, seen.replicas) == (ReleaseState.READY, 1)
        await asyncio.sleep(0.1)
    await restarted.aclose()


async def test_a_model_that_never_answered_does_not_sleep(reconciled: Reconciled) -> None:
    reconciled.kubectl("label", "namespace", reconciled.namespace, "test-waiting=ImagePullBackOff")
    reconciled.cluster.apply(*WAITING)
    await policy_is_in_force(reconciled)
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.FAILED)
    reconciled.kubectl("delete", "scaledobject", await reconciled.name(id), "--wait=false")
    reconciled.kubectl("scale", "deployment", await reconciled.name(id), "--replicas=0")
    for _ in range(30):
        assert (await reconciled.release(id)).status is not DeploymentStatus.READY
        await asyncio.sleep(0.1)


async def test_pods_of_an_older_template_say_nothing_of_the_new_one(reconciled: Reconciled) -> None:
    id = await reconciled.deploy(gpu_count=8)
    await reconciled.becomes(id, DeploymentStatus.FAILED, 40)
    await reconciled.again(id, gpu_count=1)
    await reconciled.until(id, lambda release: release.generation == 2 and release.status is DeploymentStatus.READY)
    assert await reconciled.events(id) == ["applied", "failed", "applied", "ready"]


INSISTING = (
    {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": "test-insisting"},
        "spec": {
            "matchConstraints": {
                "namespaceSelector": {"matchExpressions": [{"key": "test-scheduler", "operator": "Exists"}]},
                "resourceRules": [
                    {
                        "apiGroups": ["apps"],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE", "UPDATE"],
                        "resources": ["deployments"],
                    }
                ],
            },
            "reinvocationPolicy": "Never",
            "mutations": [
                {
                    "patchType": "JSONPatch",
                    "jsonPatch": {
                        "expression": '[JSONPatch{op: "replace", path: "/spec/template/spec/enableServiceLinks", value: true}]'
                    },
                }
            ],
        },
    },
    {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": "test-insisting"},
        "spec": {"policyName": "test-insisting"},
    },
)
"""Changes what the studio sets, as an admission webhook might."""
