"""The users part of the protocol: which prefix an end user gets."""

from prefixd.client.types import Binding, BindingPage, DefaultPrefix, ImportedBindings
from prefixd.client.wire import Call, Response, no_content, parse_body, parser, request_of


def bind_user(user: str, prefix: str) -> Call[Binding]:
    """Bind ``user`` to a prefix reference (``name``, ``name@3`` or ``name@alias``)."""
    request = request_of("PUT", "v1", "users", user, "prefix", json={"prefix": prefix})
    return Call(request, parser(Binding))


def show_binding(user: str) -> Call[Binding]:
    """The binding of ``user``."""
    return Call(request_of("GET", "v1", "users", user, "prefix"), parser(Binding))


def unbind_user(user: str) -> Call[None]:
    """Remove a binding: the user then gets the tenant's default prefix, or the base."""
    return Call(request_of("DELETE", "v1", "users", user, "prefix"), no_content)


def list_bindings(*, limit: int | None = None, after: str | None = None) -> Call[BindingPage]:
    """Bindings in the order of users, a page at a time."""
    params = {"limit": limit, "after": after}
    return Call(request_of("GET", "v1", "users", params=params), parser(BindingPage))


def import_bindings(lines: bytes) -> Call[int]:
    """Bind many users: lines of ``{"user": …, "prefix": …}``. Returns their number."""
    request = request_of("POST", "v1", "users", "bindings:import", ndjson=lines)
    return Call(request, lambda response: parse_body(ImportedBindings, response).imported)


def show_default() -> Call[str]:
    """The prefix reference of users without a binding."""
    return Call(request_of("GET", "v1", "default", "prefix"), _default_prefix)


def set_default(prefix: str) -> Call[str]:
    """Set the prefix reference of users without a binding."""
    request = request_of("PUT", "v1", "default", "prefix", json={"prefix": prefix})
    return Call(request, _default_prefix)


def remove_default() -> Call[None]:
    """Remove the default: users without a binding get the base."""
    return Call(request_of("DELETE", "v1", "default", "prefix"), no_content)


def _default_prefix(response: Response) -> str:
    return parse_body(DefaultPrefix, response).prefix
