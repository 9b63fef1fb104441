"""The studio's errors.

    StudioError
    |-- BadRequest                400  the request cannot be understood
    |-- Unauthorized              401  the admin token or API key is missing or wrong
    |-- NotFound                  404  not there, or another client's
    |   `-- ModelNotFound         404  no such model for this client, as OpenAI's clients are told
    |-- Conflict                  409  the state does not allow it
    |-- TooLarge                  413  over a limit; the message names the setting
    |-- Invalid                   422  understood, and wrong: names the field or the line
    |   `-- KeyReused             422  an Idempotency-Key came again with another body
    |-- RateLimited               429  over one of the client's limits; retryable, and says when
    |-- Refused                   500  a backend (Kubernetes, Ray) refused for good; its own message
    |-- Upstream                  502  a model server broke
    |-- Unavailable               503  a part is away for now; retryable
    |   |-- Denied                503  a part does not take the studio's own credentials; the message names the setting
    |   `-- NotReady              503  the model is starting
    |       `-- DeploymentFailed  503  the model could not be started
    `-- UpstreamTimeout           504  a model server did not answer in time

Each class has `status` (HTTP), `code` (machine-readable) and `retryable` (whether the same call may succeed later:
consumers back off on retryable errors and dead-letter the others).
"""

from collections.abc import Sequence
from typing import Any, ClassVar


class StudioError(Exception):
    """Something went wrong in the studio."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, details: Sequence[dict[str, Any]] | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.details = list(details or [])

    @property
    def message(self) -> str:
        return str(self)


class BadRequest(StudioError):
    """The request cannot be understood."""

    status, code = 400, "bad_request"


class Unauthorized(StudioError):
    """This needs the studio's admin token: `Authorization: Bearer <MINI_STUDIO_API__ADMIN_TOKEN>`."""

    status, code = 401, "unauthorized"


class NotFound(StudioError):
    """There is no such thing."""

    status, code = 404, "not_found"


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "model_not_found"


class Conflict(StudioError):
    """The present state does not allow this."""

    status, code = 409, "conflict"


class TooLarge(StudioError):
    """The request is over a limit."""

    status, code = 413, "too_large"


class Invalid(StudioError):
    """The request is not valid."""

    status, code = 422, "invalid"


class KeyReused(Invalid):
    """This Idempotency-Key was used before with another request; use a new key for a new request."""

    code = "idempotency_key_reused"


class RateLimited(StudioError):
    """This client is over one of its limits; try again later."""

    status, code, retryable = 429, "rate_limit_exceeded", True

    def __init__(self, message: str, *, retry_after_s: float, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = headers
        """`x-ratelimit-*`, as OpenAI's clients read them."""


class Refused(StudioError):
    """A backend refused this for good."""

    status, code = 500, "refused"


class Upstream(StudioError):
    """The model server failed to answer."""

    status, code = 502, "upstream_error"


class Unavailable(StudioError):
    """A part of the studio is away for now; try again shortly."""

    status, code, retryable = 503, "unavailable", True


class Denied(Unavailable):
    """A part does not take the credentials that the studio has for it."""


class NotReady(Unavailable):
    """The model is not ready yet; try again shortly."""

    code = "not_ready"


class DeploymentFailed(NotReady):
    """The deployment failed; deploy again when its cause is gone."""

    code = "deployment_failed"


class UpstreamTimeout(StudioError):
    """The model server did not answer in time."""

    status, code, retryable = 504, "upstream_timeout", True
