"""Idempotency keys: the first request under a key decides what the key stands for."""

import hashlib
from typing import ClassVar

from events.base import Cause
from events.types import derived_id
from mini_studio.errors import KeyReused
from mini_studio.records.record import ANYONE, Record, Repository
from mini_studio.records.store import Collection, DuplicateRecord


class IdempotencyKey(Record):
    """What a tenant's key on one kind of request stands for."""

    COLLECTION: ClassVar = Collection("idempotency_keys")

    fingerprint: str


def fingerprint(*parts: str) -> str:
    """SHA-256 over what must be the same when a request is repeated."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


class IdempotencyKeys(Repository[IdempotencyKey]):
    async def claim(self, tenant: str, action: str, key: str, value: str, *, cause: Cause, at: str) -> None:
        """Tie the key to a request's fingerprint, once. Raises `KeyReused` when it stands for another request."""
        id = derived_id("key", tenant, action, key)
        try:
            await self.insert(IdempotencyKey(id=id, client_code=tenant, created_at=at, cause=cause, fingerprint=value))
        except DuplicateRecord:
            present = await self.get(ANYONE, id)
            if present is not None and present.fingerprint != value:
                raise KeyReused from None
