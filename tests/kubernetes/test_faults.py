"""Faults of a real control plane: what was asked for meanwhile is there 30 s after their end, and nothing is gone that should stay."""

import asyncio
import json
import ssl
import subprocess
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from events.types import DeploymentStatus
from mini_studio.settings import Kubernetes
from tests.fakes.real_kubernetes import RealKubernetes
from tests.fakes.waiting import until
from tests.faults.length import length
from tests.kubernetes.reconciling import Reconciled, reconciling

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

CONVERGED_S = 30


async def paused(cluster: RealKubernetes) -> None:
    await asyncio.to_thread(cluster.pause)
    await asyncio.sleep(length(short=15, full=60))
    await asyncio.to_thread(cluster.resume)


async def killed(cluster: RealKubernetes) -> None:
    await asyncio.to_thread(cluster.kill, "kube-apiserver")
    await asyncio.sleep(length(short=5, full=60))
    await asyncio.to_thread(cluster.start_again)


async def etcd_restarted(cluster: RealKubernetes) -> None:
    await asyncio.to_thread(cluster.kill, "etcd")
    await asyncio.sleep(length(short=5, full=30))
    await asyncio.to_thread(cluster.start_again)


@pytest.mark.parametrize("fault", [paused, killed, etcd_restarted])
async def test_the_control_plane_goes_and_comes(
    reconciled: Reconciled,
    stoppable_kubernetes: RealKubernetes,
    fault: Callable[[RealKubernetes], asyncio.Future[None]],
) -> None:
    kept = [await reconciled.deploy() for _ in range(2)]
    leaving = await reconciled.deploy()
    for id in (*kept, leaving):
        await reconciled.becomes(id, DeploymentStatus.READY)
    before = await uids(reconciled, kept)
    happening = asyncio.ensure_future(fault(stoppable_kubernetes))
    await asyncio.sleep(2)
    coming = await reconciled.deploy()
    await reconciled.undeploy(leaving)
    while not happening.done():
        for id in kept:
            assert (await reconciled.release(id)).status is DeploymentStatus.READY
        await asyncio.sleep(0.2)
    await happening
    await reconciled.becomes(coming, DeploymentStatus.READY, CONVERGED_S)
    await reconciled.becomes(leaving, DeploymentStatus.REMOVED, CONVERGED_S)
    for id in kept:
        # after 40 s without its API server a node counts as not ready for a moment, and so do its pods
        await reconciled.becomes(id, DeploymentStatus.READY, CONVERGED_S)
        assert set(await reconciled.events(id)) == {"applied", "ready"}
    assert await uids(reconciled, kept) == before


async def uids(reconciled: Reconciled, ids: list[str]) -> dict[str, str]:
    """Of the releases' objects, by kind and name."""
    names = [await reconciled.name(id) for id in ids]
    found = reconciled.cluster.get("deployments,services,scaledobjects,pods", reconciled.namespace)
    ours = [found["metadata"] | {"kind": found["kind"]} for found in found]
    return {f"{o['kind']}/{o['name']}": o["uid"] for o in ours if any(o["name"].startswith(name) for name in names)}


async def test_the_namespace_is_deleted_and_made_again(reconciled: Reconciled) -> None:
    id = await reconciled.deploy()
    await reconciled.becomes(id, DeploymentStatus.READY)
    await asyncio.to_thread(reconciled.cluster.kubectl, "delete", "namespace", reconciled.namespace)
    refused = await reconciled.becomes(await reconciled.deploy(), DeploymentStatus.FAILED)
    assert refused.message is not None
    assert f"check that the namespace {reconciled.namespace} exists" in refused.message
    assert not (await reconciled.release(id)).settled
    reconciled.cluster.kubectl("create", "namespace", reconciled.namespace)
    await reconciled.becomes(id, DeploymentStatus.READY, CONVERGED_S)
    assert f"Deployment/{await reconciled.name(id)}" in reconciled.objects()


async def test_a_quota_for_deployments_refuses_with_its_reason_and_leaves_nothing(reconciled: Reconciled) -> None:
    reconciled.cluster.apply(quota(reconciled.namespace, "count/deployments.apps", 0))
    await quota_is_in_force(reconciled)
    id = await reconciled.deploy()
    release = await reconciled.becomes(id, DeploymentStatus.FAILED)
    assert release.settled
    assert "exceeded quota: test" in (release.message or "")
    await until(lambda: reconciled.objects() == set())
    reconciled.kubectl("delete", "resourcequota", "test")
    await reconciled.again(id)
    await reconciled.becomes(id, DeploymentStatus.READY, CONVERGED_S)


async def test_a_quota_for_pods_is_reported_and_recovered_from(reconciled: Reconciled) -> None:
    reconciled.cluster.apply(quota(reconciled.namespace, "pods", 0))
    await quota_is_in_force(reconciled)
    id = await reconciled.deploy()
    release = await reconciled.becomes(id, DeploymentStatus.FAILED)
    assert "Its pods cannot be made" in (release.message or "")
    assert "exceeded quota: test" in (release.message or "")
    assert not release.settled
    reconciled.kubectl("delete", "resourcequota", "test")
    await reconciled.becomes(id, DeploymentStatus.READY, CONVERGED_S)


def quota(namespace: str, what: str, most: int) -> dict[str, object]:
    metadata = {"name": "test", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": {what: str(most)}}}


async def quota_is_in_force(reconciled: Reconciled) -> None:
    """Until its usage was counted nothing is held against it."""
    for _ in range(100):
        found = json.loads(reconciled.kubectl("get", "resourcequota", "test", "-o", "json"))
        if found.get("status", {}).get("used"):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the quota was never counted")


async def test_a_token_that_ends_is_read_anew(real_cluster: RealKubernetes, namespace: str, tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    account(real_cluster, namespace, "first", kubeconfig)
    settings = Kubernetes(namespace=namespace, kubeconfig=kubeconfig, runtime="studio", request_timeout_s=3)
    async with reconciling(real_cluster, tmp_path, settings) as reconciled:
        kept = await reconciled.deploy()
        await reconciled.becomes(kept, DeploymentStatus.READY)
        reconciled.kubectl("delete", "serviceaccount", "first")  # its tokens end with it
        await asyncio.sleep(12)  # the API server believes in a token for 10 s
        coming = await reconciled.deploy()
        await asyncio.sleep(3)
        assert (await reconciled.release(coming)).status is DeploymentStatus.DEPLOYING
        account(real_cluster, namespace, "second", kubeconfig)
        await reconciled.becomes(coming, DeploymentStatus.READY, CONVERGED_S)
        assert await reconciled.events(kept) == ["applied", "ready"]


def account(cluster: RealKubernetes, namespace: str, name: str, kubeconfig: Path) -> None:
    """A service account that may do everything in the namespace, and a kubeconfig with a token of its own."""
    cluster.kubectl("-n", namespace, "create", "serviceaccount", name)
    binding = ["create", "rolebinding", name, "--clusterrole=cluster-admin", f"--serviceaccount={namespace}:{name}"]
    cluster.kubectl("-n", namespace, *binding)
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": cluster.kubectl("-n", namespace, "create", "token", name).strip()}
    kubeconfig.write_text(yaml.safe_dump(config))


@pytest.fixture
def denying_webhook(real_cluster: RealKubernetes, namespace: str, tmp_path: Path) -> Iterator[None]:
    """An admission webhook that denies every change of this namespace's Deployments and Services."""
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.crt"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names], check=True, capture_output=True)

    class Deny(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            denial = {
                "uid": review["request"]["uid"],
                "allowed": False,
                "status": {"message": "not on a Friday", "code": 403},
            }
            body = json.dumps({**review, "response": denial}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Deny)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rule = {
        "apiGroups": ["", "apps"],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["deployments", "services"],
    }
    webhook = {
        "name": "test.mini-studio.io",
        "clientConfig": {
            "url": f"https://127.0.0.1:{server.server_port}/",
            "caBundle": b64encode(certificate.read_bytes()).decode(),
        },
        "rules": [rule],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "failurePolicy": "Fail",
    }
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    real_cluster.apply({**kind, "metadata": {"name": namespace}, "webhooks": [webhook]})
    yield
    real_cluster.kubectl("delete", "validatingwebhookconfiguration", namespace, "--ignore-not-found")
    server.shutdown()
    server.server_close()


async def test_a_webhook_denies(reconciled: Reconciled, request: pytest.FixtureRequest) -> None:
    kept = await reconciled.deploy()
    await reconciled.becomes(kept, DeploymentStatus.READY)
    name = await reconciled.name(kept)
    request.getfixturevalue("denying_webhook")
    for _ in range(100):
        dry = ["label", "service", name, "test=1", "--dry-run=server"]
        try:
            await asyncio.to_thread(reconciled.kubectl, *dry)
        except subprocess.CalledProcessError:
            break
        await asyncio.sleep(0.1)
    id = await reconciled.deploy()
    release = await reconciled.becomes(id, DeploymentStatus.FAILED)
    assert "not on a Friday" in (release.message or "")
    assert release.settled
    reconciled.kubectl("delete", "service", name)  # it cannot be repaired now
    await asyncio.sleep(3)
    assert (await reconciled.release(kept)).status is DeploymentStatus.READY
    assert reconciled.kubectl("get", "service", "--no-headers", "--ignore-not-found") == ""
    reconciled.kubectl("delete", "validatingwebhookconfiguration", reconciled.namespace)
    for _ in range(CONVERGED_S * 5):
        if f"Service/{name}" in reconciled.objects():
            break
        await asyncio.sleep(0.2)
    assert f"Service/{name}" in reconciled.objects()
    await reconciled.again(id)
    await reconciled.becomes(id, DeploymentStatus.READY, CONVERGED_S)
