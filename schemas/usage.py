"""REST models of usage."""

from pydantic import BaseModel, Field

from events.types import Owner


class UsageSums(BaseModel):
    """Sums over the requests of the period; of a sample, scaled up."""

    requests: int
    errors: int = Field(
        description="Requests that were answered with a status of 400 or more, or hung up before (499)."
    )
    prompt_tokens: int = Field(description="As the model servers reported them.")
    completion_tokens: int
    requests_without_tokens: int = Field(
        description="Requests of which the model server reported no tokens; the sums of tokens lack theirs."
    )
    mean_total_ms: float | None = Field(description="Of a request, from its arrival to the end of its answer.")
    mean_first_byte_ms: float | None = Field(
        description="From a request's arrival to the first byte of its answer, over those that had one."
    )


class ModelUsage(UsageSums):
    model: str = Field(description="Empty for requests that no deployment was there for.")


class UsageResponse(BaseModel):
    """A sampled account of which some may be lost (docs/inference.md says when): for charts and quotas, not for bills."""

    ok: bool = True
    client_code: Owner = Field(description="Empty: callers that named no client.")
    begin: str = Field(serialization_alias="from", description="The first hour, RFC 3339 in UTC.")
    end: str = Field(serialization_alias="to", description="The end of the last hour.")
    models: list[ModelUsage] = Field(description="By name.")
    total: UsageSums
