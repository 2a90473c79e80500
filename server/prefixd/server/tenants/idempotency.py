"""Stored responses: a request repeated under its idempotency key changes nothing."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select

from prefixd.server.errors import BadRequest, Conflict
from prefixd.server.tenants.tables import KEPT_FOR, idempotency_keys
from prefixd.server.tenants.usage import check_quota
from prefixd.store.db.database import reading, utc_now

KEY = r"[\x21-\x7e]{1,255}"
"""The regular expression of an Idempotency-Key."""

_KEY = re.compile(KEY)


@dataclass(frozen=True, slots=True)
class Replay:
    """The response to the first request under a key."""

    status: int
    body: Mapping[str, Any]
    etag: str | None = None


def check_key(key: str) -> str:
    """Return ``key`` or raise BadRequest."""
    if _KEY.fullmatch(key) is None:
        raise BadRequest(
            "expected an Idempotency-Key of 1 to 255 visible ASCII characters; "
            f"received {len(key)} characters",
            param="Idempotency-Key",
        )
    return key


class Idempotency:
    """Blocking calls on the catalog; safe to share between threads."""

    def __init__(self, engine: Engine, *, now: Callable[[], datetime] = utc_now) -> None:
        self._engine = engine
        self._now = now

    def find(self, tenant: str, key: str, *, request_digest: str) -> Replay | None:
        """The response under ``key``. Raises Conflict when it belongs to another request."""
        query = select(idempotency_keys).where(
            idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key
        )
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        if row is None or row.created_at <= self._now() - KEPT_FOR:
            return None
        if row.request_digest != request_digest:
            raise Conflict(
                "this Idempotency-Key was used for another request: the same key needs the same "
                "name and the same body",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return Replay(status=row.status, body=json.loads(row.body_json), etag=row.etag)

    def keep(
        self,
        connection: Connection,
        tenant: str,
        key: str,
        *,
        request_digest: str,
        replay: Replay,
    ) -> None:
        """Store the response in the transaction of the request; delete the tenant's old responses.

        Raises IntegrityError when a request under the same key was first: call ``find`` again.
        Raises QuotaExceeded.
        """
        now = self._now()
        expired = idempotency_keys.c.created_at <= now - KEPT_FOR
        connection.execute(
            delete(idempotency_keys).where(idempotency_keys.c.tenant == tenant, expired)
        )
        connection.execute(
            insert(idempotency_keys).values(
                tenant=tenant,
                key=key,
                request_digest=request_digest,
                status=replay.status,
                body_json=json.dumps(dict(replay.body)),
                etag=replay.etag,
                created_at=now,
            )
        )
        check_quota(connection, tenant, {"max_idempotency_keys": 1}, now=now)
