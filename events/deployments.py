"""Events of a deployment; the aggregate is its identity (client, kind, model, weights), for ever.

Removing and deploying again continues the same sequences with a higher `generation`, so a late removal never hits its successor.
"""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from events.base import Event, Source
from events.topics import Topic
from events.types import DeploymentId, DeploymentKind, DeploymentName, ModelName


class Scale(BaseModel):
    """How many replicas, and when there should be more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gpu_count: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=1)
    prometheus_threshold: float = Field(
        gt=0, description="Requests waiting per replica above which replicas are added."
    )


class DeploymentEvent(Event):
    TOPIC: ClassVar = Topic.DEPLOYMENTS

    deployment_id: DeploymentId
    generation: int = Field(ge=1)


class DeployRequested(DeploymentEvent):
    """A client asked for a model to be served, or for a served one to be scaled otherwise."""

    TYPE: ClassVar = "deployment.requested.v1"
    SOURCE: ClassVar = Source.API

    name: DeploymentName
    kind: DeploymentKind
    model: ModelName = Field(description="The name it is asked for by.")
    base_model: ModelName
    weights_path: str | None = Field(None, description="Folder of fine-tuned weights; null serves the base model.")
    scale: Scale


class UndeployRequested(DeploymentEvent):
    """A client asked for the deployment to be removed."""

    TYPE: ClassVar = "deployment.removal_requested.v1"
    SOURCE: ClassVar = Source.API

    name: DeploymentName


class ReleaseEvent(DeploymentEvent):
    SOURCE: ClassVar = Source.SERVING

    name: DeploymentName


class DeploymentApplied(ReleaseEvent):
    """The driver has the objects; the model is starting."""

    TYPE: ClassVar = "deployment.applied.v1"

    message: str | None = None


class DeploymentReady(ReleaseEvent):
    """The model answers at `endpoints`; sent again whenever they or `replicas` change. No replicas: it sleeps, and a request wakes it."""

    TYPE: ClassVar = "deployment.ready.v1"

    endpoints: list[str]
    predict_path: str = "/predict"
    replicas: int
    message: str | None = None


class DeploymentFailed(ReleaseEvent):
    """It cannot be served. `refused` means that the backend rejected it before anything ran."""

    TYPE: ClassVar = "deployment.failed.v1"

    refused: bool = False
    message: str = Field(description="What happened and what to do.")


class DeploymentRemoved(ReleaseEvent):
    """Its objects are gone."""

    TYPE: ClassVar = "deployment.removed.v1"
