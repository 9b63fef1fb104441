"""What a release's objects say about it: a pure function of the Deployment and its pods, as they were last seen."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from mini_studio.drivers.kubernetes.api import Object
from mini_studio.drivers.kubernetes.manifests import CONTENT, DEPLOYMENT_ID, GENERATION, annotation
from mini_studio.drivers.ports import ReleaseReport, ReleaseState

UNSCHEDULABLE_S = 10.0
"""A pod may be without a node so long before that is news."""
STUCK = frozenset(
    (
        "ImagePullBackOff",
        "ErrImagePull",
        "InvalidImageName",
        "ErrImageNeverPull",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
        "CrashLoopBackOff",
    )
)
"""Reasons for which a container waits that seldom pass by themselves."""
HINTS = {
    "ImagePullBackOff": "check the image's name in MINI_STUDIO_SERVING__KUBERNETES__*_IMAGE and its pull secrets",
    "ErrImagePull": "check the image's name in MINI_STUDIO_SERVING__KUBERNETES__*_IMAGE and its pull secrets",
    "InvalidImageName": "correct MINI_STUDIO_SERVING__KUBERNETES__*_IMAGE",
    "CrashLoopBackOff": "its log says why: kubectl logs --previous",
    "OOMKilled": "raise MINI_STUDIO_SERVING__KUBERNETES__MEMORY, or serve a smaller model",
}


def report(deployment: Object, pods: Sequence[Object], endpoint: str, *, was_complete: bool) -> ReleaseReport:
    """The release as it stands.

    Ready: its rollout has been completed once (`was_complete` remembers that over a later one of the same generation, and over sleep)
    and a replica is available, which means that it answers `/health`; or it sleeps, scaled to zero. Failed: its pods cannot be made or
    cannot run; it is ready again when they do.
    """
    metadata, status = deployment["metadata"], deployment.get("status", {})
    available = int(status.get("availableReplicas", 0))
    asleep = deployment["spec"].get("replicas", 1) == 0
    answers = (complete(deployment) or was_complete) and (available > 0 or asleep)
    trouble = None if asleep else problem(deployment, pods)
    if answers:
        state = ReleaseState.READY
    elif trouble:
        state = ReleaseState.FAILED
    else:
        state = ReleaseState.STARTING
    waiting = f"{available} of {deployment['spec'].get('replicas', 1)} replicas are available."
    message = trouble or ("" if answers else waiting)
    return ReleaseReport(
        metadata["name"],
        annotation(deployment, DEPLOYMENT_ID),
        int(annotation(deployment, GENERATION)),
        state,
        available,
        endpoints=[endpoint] if answers else [],
        message=message,
    )


def complete(deployment: Object) -> bool:
    """Whether the present template's rollout has been completed and it answers. A rollout to no replica says nothing of it."""
    status = deployment.get("status", {})
    answers = status.get("availableReplicas", 0) > 0
    seen = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    return answers and seen and _condition(deployment, "Progressing").get("reason") == "NewReplicaSetAvailable"


def problem(deployment: Object, pods: Sequence[Object]) -> str | None:
    """Why it cannot run, for a person, with what to do; None while nothing speaks against it."""
    blocked = _condition(deployment, "ReplicaFailure")
    if blocked.get("status") == "True":
        return f"Its pods cannot be made: {blocked.get('message', blocked.get('reason'))}"
    # pods of an older template go on until the new ones answer, and say nothing of these
    content = annotation(deployment["spec"]["template"], CONTENT)
    present = [p for p in pods if annotation(p, CONTENT) == content and "deletionTimestamp" not in p["metadata"]]
    for pod in sorted(present, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
        if found := _pod_problem(pod):
            return found
    return None


def _pod_problem(pod: Object) -> str | None:
    name = pod["metadata"]["name"]
    scheduled = _condition(pod, "PodScheduled")
    if scheduled.get("reason") == "Unschedulable" and _age_s(scheduled) > UNSCHEDULABLE_S:
        return f"No node can take the pod {name}: {scheduled.get('message')} Add nodes, or ask for less."
    for container in pod.get("status", {}).get("containerStatuses", ()):
        waiting = container.get("state", {}).get("waiting", {})
        reason = waiting.get("reason", "")
        if reason in STUCK:
            ended = container.get("lastState", {}).get("terminated", {})
            why = ended.get("reason", reason)
            code = f", last exit code {ended['exitCode']} ({why})" if "exitCode" in ended else ""
            hint = HINTS.get(why, HINTS.get(reason, "see kubectl describe pod"))
            # of a crash loop it is how long the next pause is: news each time, and nothing to a person
            said = "" if reason == "CrashLoopBackOff" else " ".join(str(waiting.get("message") or "").split())[:500]
            return f"The pod {name} does not run: {reason}{code}{': ' + said if said else ''}; {hint}."
    if pod.get("status", {}).get("phase") == "Failed":
        status = pod["status"]
        return f"The pod {name} failed: {status.get('reason', '')} {status.get('message', '')}".strip() + "."
    return None


def _condition(of: Object, type: str) -> dict[str, Any]:
    conditions = of.get("status", {}).get("conditions") or ()
    return next((condition for condition in conditions if condition["type"] == type), {})


def _age_s(condition: dict[str, Any]) -> float:
    since = datetime.fromisoformat(condition.get("lastTransitionTime") or "1970-01-01T00:00:00Z")
    return (datetime.now(UTC) - since).total_seconds()
