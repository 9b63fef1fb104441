"""Idempotency keys: the first request under a key decides what the key stands for."""

import hashlib
from typing import ClassVar

from pydantic import Field

from events.base import Cause
from events.types import derived_id
from mini_studio.errors import KeyReused
from mini_studio.records.record import ANYONE, Record, Repository
from mini_studio.records.store import Collection, DuplicateRecord


class IdempotencyKey(Record):
    """What a tenant's key on one kind of request stands for."""

    COLLECTION: ClassVar = Collection("idempotency_keys")

    fingerprint: str
    generation: int = Field(0, description="Of a deployment, the generation that has this request behind it.")


def fingerprint(*parts: str) -> str:
    """SHA-256 over what must be the same when a request is repeated."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


class IdempotencyKeys(Repository[IdempotencyKey]):
    async def claim(
        self, tenant: str, action: str, key: str, value: str, *, cause: Cause, at: str, generation: int = 0
    ) -> IdempotencyKey:
        """Tie the key to a request's fingerprint, once: as it was tied first. Raises `KeyReused` when it stands for another request."""
        id = derived_id("key", tenant, action, key)
        claimed = IdempotencyKey(
            id=id, client_code=tenant, created_at=at, cause=cause, fingerprint=value, generation=generation
        )
        try:
            await self.insert(claimed)
        except DuplicateRecord:
            claimed = await self.get(ANYONE, id) or claimed
        if claimed.fingerprint != value:
            raise KeyReused
        return claimed
