"""The header Idempotency-Key: a repeated request gets the first response and changes nothing."""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy import Connection

from prefixd.server.api.dependencies import IdempotencyDep, principal_of
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.idempotency import Idempotency, Keep, Replay, check_key
from prefixd.server.tenants.principal import Principal


class Repeatable:
    """A request that may have an Idempotency-Key, of the caller's tenant."""

    def __init__(
        self, request: Request, idempotency: Idempotency, principal: Principal, key: str | None
    ) -> None:
        self.key = key
        self.tenant = principal.tenant
        self._request = request
        self._idempotency = idempotency

    def once(
        self,
        digest: str,
        change: Callable[[Keep], Replay],
        response: Response,
        *,
        within_quota: bool = True,
    ) -> Any:
        """Run ``change``, or find the response of the request with the same ``digest`` that was
        first, and give ``response`` its status and headers; the body. ``within_quota`` False: the
        quota of stored responses does not refuse it. Blocking."""
        replay, replayed = self._idempotency.once(
            self.tenant, self.key, digest, change, within_quota=within_quota
        )
        return answer(replay, response, replayed=replayed)

    def once_for(
        self,
        body: BaseModel,
        change: Callable[[Keep], Replay],
        response: Response,
        *,
        within_quota: bool = True,
    ) -> Any:
        """``once`` for a request with this JSON body."""
        digest = self.digest(body.model_dump_json(exclude_unset=True))
        return self.once(digest, change, response, within_quota=within_quota)

    def digest(self, *parts: str) -> str:
        """SHA-256 of method, path and ``parts``."""
        scope = self._request.scope
        return request_digest(scope["method"], scope["path"], *parts)

    def find(self, digest: str, response: Response) -> Any:
        """The body of the response of the request with this digest, None when none is stored.
        Blocking. Raises Conflict for a key of another request."""
        if self.key is None:
            return None
        replay = self._idempotency.find(self.tenant, self.key, request_digest=digest)
        return None if replay is None else answer(replay, response, replayed=True)

    def keep(self, connection: Connection, digest: str, replay: Replay) -> None:
        """Store the response, if there is a key, at the end of the transaction of the change."""
        if self.key is not None:
            self._idempotency.keep(
                connection, self.tenant, self.key, request_digest=digest, replay=replay
            )

    def is_known(self) -> bool:
        """Whether a response is stored under the key, for whichever request. Blocking."""
        return self.key is not None and self._idempotency.is_known(self.tenant, self.key)


def answer(replay: Replay, response: Response, *, replayed: bool) -> Any:
    """Give ``response`` the status and headers of a stored response; its body."""
    response.status_code = replay.status
    if replay.etag is not None:
        response.headers["ETag"] = replay.etag
    if replayed:
        response.headers["idempotency-replayed"] = "true"
    return replay.body


def request_digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each preceded by its length."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "big") + raw)
    return total.hexdigest()


async def _repeatable(
    request: Request,
    idempotency: IdempotencyDep,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key with the same request gets the same response, for a day."),
    ] = None,
) -> Repeatable:
    received = request.headers.getlist("idempotency-key")
    if len(received) > 1:
        raise BadRequest(
            f"expected one Idempotency-Key; received {len(received)}", param="Idempotency-Key"
        )
    key = None if idempotency_key is None else check_key(idempotency_key)
    return Repeatable(request, idempotency, principal_of(request), key)


RepeatableDep = Annotated[Repeatable, Depends(_repeatable)]
