"""Stored responses: a request repeated under its idempotency key changes nothing."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, insert, select
from sqlalchemy.exc import IntegrityError

from prefixd.server.errors import BadRequest, Conflict, PrefixdError
from prefixd.server.tenants.tables import KEPT_FOR, idempotency_keys
from prefixd.server.tenants.usage import check_quota
from prefixd.store.db.database import reading, utc_now
from prefixd.store.errors import StoreError

KEY = r"[\x21-\x7e]{1,255}"
"""The regular expression of an Idempotency-Key."""

_KEY = re.compile(KEY)


@dataclass(frozen=True, slots=True)
class Replay:
    """The response to the first request under a key."""

    status: int
    body: Mapping[str, Any]
    etag: str | None = None


CAUSES = (IntegrityError, PrefixdError, StoreError)
"""Errors of a request that may come from a concurrent one under the same key, which was faster."""

Keep = Callable[[Connection, Replay], object]
"""Stores the response in the transaction of the change; must be called at its end."""


def _keep_nothing(*_: object) -> None:
    """For a request without a key."""


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

    def once(
        self,
        tenant: str,
        key: str | None,
        digest: str,
        change: Callable[[Keep], Replay],
        *,
        within_quota: bool = True,
    ) -> tuple[Replay, bool]:
        """The response to the request ``digest``, and whether it is that of an earlier request
        under the same key: then ``change`` was not called, or was rolled back. Raises Conflict for
        a key of another request, and what ``change`` raises, which is not stored. ``within_quota``
        is as for ``keep``."""
        if key is None:
            return change(_keep_nothing), False
        earlier = self.find(tenant, key, request_digest=digest)
        if earlier is not None:
            return earlier, True

        def keep(connection: Connection, replay: Replay) -> None:
            self.keep(
                connection,
                tenant,
                key,
                request_digest=digest,
                replay=replay,
                within_quota=within_quota,
            )

        try:
            return change(keep), False
        except CAUSES:
            earlier = self.find(tenant, key, request_digest=digest)
            if earlier is None:
                raise
            return earlier, True

    def is_known(self, tenant: str, key: str) -> bool:
        """Whether a response is stored under ``key``, for whichever request."""
        return self._row(tenant, key) is not None

    def find(self, tenant: str, key: str, *, request_digest: str) -> Replay | None:
        """The response under ``key``. Raises Conflict when it belongs to another request."""
        row = self._row(tenant, key)
        if row is None:
            return None
        if row.request_digest != request_digest:
            raise Conflict(
                "this Idempotency-Key was used for another request: the same key needs the same "
                "method, path and body",
                code="idempotency_key_reused",
                param="Idempotency-Key",
            )
        return Replay(status=row.status, body=json.loads(row.body_json), etag=row.etag)

    def _row(self, tenant: str, key: str) -> Row[Any] | None:
        query = select(idempotency_keys).where(
            idempotency_keys.c.tenant == tenant, idempotency_keys.c.key == key
        )
        with reading(self._engine) as connection:
            row = connection.execute(query).first()
        return None if row is None or row.created_at <= self._now() - KEPT_FOR else row

    def keep(
        self,
        connection: Connection,
        tenant: str,
        key: str,
        *,
        request_digest: str,
        replay: Replay,
        within_quota: bool = True,
    ) -> None:
        """Store the response in the transaction of the request; delete the tenant's old responses.
        With ``within_quota`` False it is stored even when the tenant has as many as it may.

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
        if within_quota:
            check_quota(connection, tenant, {"max_idempotency_keys": 1}, now=now)
