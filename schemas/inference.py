"""REST models of deployments."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from events.deployments import Scale
from events.types import ClientCode, DeploymentKind, DeploymentStatus, ModelName, Owner


class DeployScale(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    gpu_count: int = Field(1, ge=0, le=64, description="GPUs a replica; ignored where there are none.")
    min_replicas: int = Field(1, ge=0, le=64)
    max_replicas: int | None = Field(None, ge=1, le=256, description="Default: `min_replicas`, at least 1.")
    prometheus_threshold: float = Field(5, gt=0, le=10_000, description="Waiting requests a replica that add another.")

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> "DeployScale":
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas: must not be below min_replicas")
        return self

    def scale(self) -> Scale:
        return Scale(
            gpu_count=self.gpu_count,
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas or max(1, self.min_replicas),
            prometheus_threshold=self.prometheus_threshold,
        )


class BaseModelDeployRequest(DeployScale):
    """Body of `POST /inference/deploy/base`."""

    client_code: Owner = Field("", description="Empty: for every client.")
    model_id: ModelName = Field(examples=["facebook/opt-125m"])


class FineTunedDeployRequest(DeployScale):
    """Body of `POST /inference/deploy/fine_tuned`."""

    client_code: ClientCode = Field(examples=["acme"])
    base_model: ModelName
    fine_tuned_weights_path: str = Field(
        min_length=1,
        max_length=4096,
        description="As the job says: a folder below the client's own under the models root.",
    )


class DeployResponse(BaseModel):
    """`deployed` once the serving driver has it, `deploying` (202) when that was not waited for."""

    ok: bool = True
    status: Literal["deployed", "deploying"]
    deployment: str
    model: str = Field(description="The name to ask it by.")
    status_url: str


class DeploymentView(BaseModel):
    """A deployment."""

    model_config = ConfigDict(from_attributes=True, protected_namespaces=())

    id: str
    name: str
    client_code: str
    kind: DeploymentKind
    model: str
    base_model: str
    weights_path: str | None
    scale: Scale
    generation: int
    status: DeploymentStatus
    replicas: int
    message: str | None
    created_at: str
    updated_at: str


class DeploymentResponse(BaseModel):
    ok: bool = True
    deployment: DeploymentView


class DeploymentListResponse(BaseModel):
    ok: bool = True
    deployments: list[DeploymentView]
    has_more: bool
    last_id: str | None
