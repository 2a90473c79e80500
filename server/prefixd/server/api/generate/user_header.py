"""The end user of a request in a header, for frontends that name theirs there."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

from fastapi import Request

from prefixd.server.errors import BadRequest
from prefixd.server.tenants.users import check_user


class ForUser(Protocol):
    """A body with a user."""

    @property
    def user(self) -> str | None: ...

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Self:
        """A copy with other values."""
        ...


Body = TypeVar("Body", bound=ForUser)


def with_user(body: Body, request: Request, header: str | None) -> Body:
    """``body`` with the user of ``header``, where it has none. Raises BadRequest."""
    if header is None or body.user is not None:
        return body
    values = request.headers.getlist(header)
    if not values:
        return body
    if len(values) > 1:
        raise BadRequest(
            f"expected the header {header} once; received it {len(values)} times", param=header
        )
    try:
        user = check_user(values[0].encode("latin-1").decode())
    except UnicodeDecodeError:
        raise BadRequest(
            f"the header {header}: expected UTF-8; received other bytes", param=header
        ) from None
    except BadRequest as error:
        raise BadRequest(f"the header {header}: {error.message}", param=header) from None
    return body.model_copy(update={"user": user})
