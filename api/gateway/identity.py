"""Who asks: by an API key where the studio has keys, else by what the caller says.

Settings hold SHA-256 digests alone, no keys. A digest is looked up in a dictionary: what its timing tells is about the digest of what
was sent, which nobody can steer. A key has 256 random bits, so that a plain hash is enough.
"""

import hashlib
import secrets

from mini_studio.errors import BadRequest, NotFound, Unauthorized
from mini_studio.settings import OPERATOR, Settings

LONGEST_KEY = 200
REMEMBERED = 4096
"""Valid `Authorization` values of which no digest is made again."""


class Identity:
    """Keys of clients, if there are any."""

    def __init__(self, settings: Settings) -> None:
        self._clients = {digest: code for code, digests in settings.api.keys.items() for digest in digests}
        self._remembered: dict[str, str] = {}
        self.required = bool(self._clients)
        """Whether callers need a key."""

    def client(self, authorization: str | None, named: str | None) -> str | None:
        """The client code: of the key, or without keys whom the caller named (X-User-ID, OpenAI-Organization, client_code).

        Raises `Unauthorized` when there are keys and this is none of them, and `NotFound` when it belongs to another client than
        the named one. None is nobody in particular: who names none without keys, or with the operator's.
        """
        if not self.required:
            return named
        code = self._remembered.get(authorization or "") or self._look_up(authorization)
        if code == OPERATOR:
            return named
        if named is not None and named != code:
            raise NotFound(f"there is no client {named[:80]!r} for this API key")
        return code

    def _look_up(self, authorization: str | None) -> str:
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthorized("an API key is needed: send it as `Authorization: Bearer <key>`")
        code = None if len(key) > LONGEST_KEY else self._clients.get(digest(key))
        if code is None:
            raise Unauthorized("this API key is not known; whoever runs the studio gives out keys")
        if len(self._remembered) >= REMEMBERED:
            self._remembered.clear()
        self._remembered[authorization or ""] = code
        return code

    def headers(self, given: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """A request's headers with `X-User-ID` as the key has it. Raises as `client` does, and `BadRequest` when one is there twice."""
        if not self.required:
            return given
        authorization = _single(given, b"authorization")
        user, organization = _single(given, b"x-user-id"), _single(given, b"openai-organization")
        code = self.client(authorization, user)
        if organization is not None and organization != user:
            organized = self.client(authorization, organization)
            if user is not None and organized != user:
                raise NotFound(f"there is no client {organization[:80]!r} for X-User-ID {user[:80]!r}")
        if code is None or user is not None:
            return given
        return [*given, (b"x-user-id", code.encode("latin-1"))]


def new_key() -> str:
    """A new API key: 256 random bits."""
    return "ms-" + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """What the settings hold of a key."""
    return hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()


def _single(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    values = [value.decode("latin-1") for other, value in headers if other == name]
    if len(values) > 1:
        raise BadRequest(f"the header {name.decode()} is there {len(values)} times")
    return values[0] if values else None
