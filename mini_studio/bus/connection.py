"""How to connect to the brokers, in one place for all clients, and why the brokers let one in or not."""

import ssl
from typing import Any

from aiokafka import errors
from aiokafka.conn import collect_hosts, create_conn

from mini_studio.errors import Unavailable
from mini_studio.settings import Kafka

NOT_THIS_USER = (
    errors.AuthenticationFailedError,
    errors.SaslAuthenticationFailed,
    errors.UnsupportedSaslMechanismError,
    errors.IllegalSaslStateError,
)
NOT_ALLOWED = (
    errors.TopicAuthorizationFailedError,
    errors.GroupAuthorizationFailedError,
    errors.ClusterAuthorizationFailedError,
)
ASK_S = 2.0


def client_options(settings: Kafka) -> dict[str, Any]:
    """What every aiokafka client is given to connect."""
    return {"bootstrap_servers": settings.bootstrap, **security_options(settings)}


def security_options(settings: Kafka) -> dict[str, Any]:
    """The part of it that is not the address."""
    options: dict[str, Any] = {"security_protocol": settings.security.upper()}
    if settings.security in ("ssl", "sasl_ssl"):
        # Read again for every client: a certificate authority may have been replaced meanwhile.
        options["ssl_context"] = ssl.create_default_context(cafile=settings.ca_file)
    if settings.username and settings.password:
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.username,
            "sasl_plain_password": settings.password.get_secret_value(),
        }
    return options


async def unavailable(settings: Kafka, error: BaseException) -> Unavailable:
    """What to raise for a client's error: the broker is away, or it lets this client do nothing, and then what to do about it.

    Both are waited out: a password or a certificate that is put right must not have cost an event.
    """
    cause: BaseException = error
    if isinstance(error, errors.KafkaConnectionError):
        cause = await _refusal(settings) or error
    at = f"the broker at {settings.bootstrap}"
    if isinstance(cause, NOT_THIS_USER):
        return Unavailable(
            f"{at} refuses user {settings.username}: {cause}; check MINI_STUDIO_KAFKA__USERNAME, "
            "MINI_STUDIO_KAFKA__PASSWORD and MINI_STUDIO_KAFKA__SASL_MECHANISM"
        )
    if isinstance(cause, NOT_ALLOWED):
        return Unavailable(f"{at} does not allow user {settings.username} to do this: {cause!r}; check its ACLs")
    if isinstance(cause, ssl.SSLError):
        return Unavailable(
            f"no TLS with {at}: {cause}; check MINI_STUDIO_KAFKA__SECURITY and MINI_STUDIO_KAFKA__CA_FILE"
        )
    return Unavailable(f"{at} is away: {error!r}")


async def _refusal(settings: Kafka) -> Exception | None:
    """Why a server lets this client not in. A client that found none says no more than that."""
    if settings.security == "plaintext":
        return None
    for host, port, _ in collect_hosts(settings.bootstrap):
        try:
            connection = await create_conn(
                host, port, request_timeout_ms=int(ASK_S * 1000), **security_options(settings)
            )
        except (*NOT_THIS_USER, ssl.SSLError) as error:
            return error
        except (errors.KafkaError, OSError, TimeoutError):
            continue
        connection.close()
    return None
