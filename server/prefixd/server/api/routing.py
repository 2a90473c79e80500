"""Requests that no route takes: 404 or 405, after authentication under /v1, and never a redirect.

A router alone compares the decoded path, so that ``/v1%2Fmodels`` would be ``/v1/models`` to this
server and another path to the proxy in front of it; and names in ``Allow`` only the methods of the
first route with that path.
"""

import posixpath
import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

from fastapi import Request
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Receive, Scope, Send

from prefixd.server.api.dependencies import authenticated
from prefixd.server.errors import BadRequest, MethodNotAllowed, NotFound

_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_NOT_SEGMENTS = frozenset({b"", b".", b".."})


def check_path(scope: Scope) -> None:
    """Raise NotFound for a path that another server may read as that of another route: empty or dot
    segments, a slash at the end, or ``%2F`` where the route has a slash. Raise BadRequest for one
    that is not UTF-8 or has control characters."""
    raw = scope.get("raw_path") or scope["path"].encode()
    if not _is_exact(raw, scope["route"].path):
        raise unknown_route()
    if b"%" in raw:
        _check_utf8(raw, "path")
        _check_controls(scope["path"])


def _check_controls(path: str) -> None:
    # To a router's regular expressions, a path with a line feed at its end equals one without.
    if _CONTROLS.search(path) is not None:
        raise BadRequest("expected no control characters in the path; received one")


def check_query(scope: Scope) -> None:
    """Raise BadRequest for a query that is not UTF-8."""
    if b"%" in scope["query_string"]:
        _check_utf8(scope["query_string"], "query")


def _is_exact(raw_path: bytes, template: str) -> bool:
    """Whether an encoded path has the segments of the route's ``template``; a parameter of several
    segments (``{user:path}``) may have more."""
    segments = raw_path.split(b"/")[1:]
    if not _NOT_SEGMENTS.isdisjoint(segments):
        return False
    expected = template.count("/")
    return len(segments) == expected or (len(segments) > expected and ":path}" in template)


def _check_utf8(encoded: bytes, place: str) -> None:
    # Decoded with replacement characters, different texts would become one.
    try:
        unquote_to_bytes(encoded).decode()
    except UnicodeDecodeError:
        raise BadRequest(
            f"expected percent-encoded UTF-8 in the {place}; received other bytes"
        ) from None


def _is_keyed(path: str) -> bool:
    """Whether a path is under /v1, as it is or as a proxy may normalize it."""
    normal = posixpath.normpath("/" + path.lstrip("/"))
    return any(f"{one}/".startswith("/v1/") for one in (path, normal))


def unknown_route() -> NotFound:
    """The error for a path that no route has."""
    return NotFound("no such route; see /docs", code="unknown_route")


class Unrouted(BaseRoute):
    """The last route: takes what no other takes."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Every HTTP request; the router tries the other routes first."""
        return (Match.FULL if scope["type"] == "http" else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as the base
        """Raise NotAuthenticated, MethodNotAllowed or NotFound."""
        raw = scope.get("raw_path") or scope["path"].encode()
        same_path = [
            route
            for route in self._routes
            if route.path_regex.match(scope["path"]) and _is_exact(raw, route.path)
        ]
        if _is_keyed(scope["path"]):
            await authenticated(Request(scope, receive))
        _check_controls(scope["path"])
        if not same_path:
            raise unknown_route()
        scope["route"] = same_path[0]
        methods = {method for route in same_path for method in route.methods or ()}
        allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        raise MethodNotAllowed(
            f"expected one of the methods {allowed}; received {scope['method'][:16]!a}",
            headers={"Allow": allowed},
        )
