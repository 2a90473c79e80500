"""Paths as the route has them, and query parameters as it declares them, each once."""

from collections.abc import Iterator
from typing import get_origin

from fastapi import Request
from fastapi.dependencies.models import Dependant

from prefixd.server.api.routing import check_path, check_query
from prefixd.server.errors import BadRequest

_SHOWN = 80


async def check_url(request: Request) -> None:
    """A dependency that checks the path, and raises BadRequest for a query parameter that the route
    does not declare, and for one that came several times unless it is declared as a list."""
    check_path(request.scope)
    if not request.query_params:
        return
    check_query(request.scope)
    declared = dict(_declared(request.scope["route"].dependant))
    received = [name for name, _ in request.query_params.multi_items()]
    for name in received:
        if name not in declared:
            accepted = ", ".join(sorted(declared)) or "none here"
            raise BadRequest(
                f"unknown query parameter {name[:_SHOWN]!a}; accepted: {accepted}",
                code="unknown_parameter",
                param=name[:_SHOWN],
            )
        if not declared[name] and received.count(name) > 1:
            raise BadRequest(
                f"expected the query parameter '{name}' once; received it "
                f"{received.count(name)} times",
                code="duplicate_parameter",
                param=name,
            )


def _declared(dependant: Dependant) -> Iterator[tuple[str, bool]]:
    """The query parameters of a route and its dependencies, and whether each is a list."""
    for field in dependant.query_params:
        yield field.alias, get_origin(field.field_info.annotation) in {list, tuple, set}
    for dependency in dependant.dependencies:
        yield from _declared(dependency)
