"""The users part of the protocol: which prefix an end user gets."""

from typing import Unpack

from prefixd.client.types import Binding, BindingPage, DefaultPrefix, ImportedBindings
from prefixd.client.wire import (
    Call,
    Preconditions,
    Response,
    creating,
    guarded,
    no_content,
    parse_body,
    parser,
    request_of,
)


def bind_user(user: str, prefix: str, **conditions: Unpack[Preconditions]) -> Call[Binding]:
    """Bind ``user`` to a prefix reference (``name``, ``name@3`` or ``name@alias``)."""
    request = request_of("PUT", "v1", "users", user, "prefix", json={"prefix": prefix})
    return creating(Call(request, parser(Binding)), conditions)


def show_binding(user: str) -> Call[Binding]:
    """The binding of ``user``."""
    return Call(request_of("GET", "v1", "users", user, "prefix"), parser(Binding))


def unbind_user(user: str, **conditions: Unpack[Preconditions]) -> Call[None]:
    """Remove a binding: the user then gets the tenant's default prefix, or the base."""
    return guarded(
        Call(request_of("DELETE", "v1", "users", user, "prefix"), no_content), conditions
    )


def list_bindings(*, limit: int | None = None, after: str | None = None) -> Call[BindingPage]:
    """Bindings in the order of users, a page at a time."""
    params = {"limit": limit, "after": after}
    return Call(request_of("GET", "v1", "users", params=params), parser(BindingPage))


def import_bindings(lines: bytes) -> Call[int]:
    """Bind many users: lines of ``{"user": …, "prefix": …}``. Returns their number."""
    request = request_of("POST", "v1", "users", "bindings:import", ndjson=lines)
    return creating(Call(request, lambda response: parse_body(ImportedBindings, response).imported))


def show_default() -> Call[str]:
    """The prefix reference of users without a binding."""
    return Call(request_of("GET", "v1", "default", "prefix"), _default_prefix)


def set_default(prefix: str, **conditions: Unpack[Preconditions]) -> Call[str]:
    """Set the prefix reference of users without a binding."""
    request = request_of("PUT", "v1", "default", "prefix", json={"prefix": prefix})
    return creating(Call(request, _default_prefix), conditions)


def remove_default(**conditions: Unpack[Preconditions]) -> Call[None]:
    """Remove the default: users without a binding get the base."""
    return guarded(Call(request_of("DELETE", "v1", "default", "prefix"), no_content), conditions)


def _default_prefix(response: Response) -> str:
    return parse_body(DefaultPrefix, response).prefix
