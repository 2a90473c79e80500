"""The protocol of bindings: which prefix an end user gets. No I/O."""

from prefixd.client import answers
from prefixd.client.protocol import Call, request_of
from prefixd.client.types import Binding, BindingPage


def bind_user(user: str, prefix: str) -> Call[Binding]:
    """Let ``user`` have a prefix (``name``, ``name@3`` or ``name@alias``) from now on."""
    request = request_of("PUT", "v1", "users", user, "prefix", json={"prefix": prefix})
    return Call(request, answers.binding)


def show_binding(user: str) -> Call[Binding]:
    """What ``user`` is bound to."""
    return Call(request_of("GET", "v1", "users", user, "prefix"), answers.binding)


def unbind_user(user: str) -> Call[None]:
    """Forget a binding: the tenant's default answers then, else the base."""
    return Call(request_of("DELETE", "v1", "users", user, "prefix"), answers.nothing)


def list_bindings(*, limit: int | None = None, after: str | None = None) -> Call[BindingPage]:
    """The users that are bound, in order, a page at a time."""
    given = {"limit": limit, "after": after}
    params = {name: value for name, value in given.items() if value is not None}
    return Call(request_of("GET", "v1", "users", params=params), answers.binding_page)


def import_bindings(lines: bytes) -> Call[int]:
    """Bind many users: lines of ``{"user": …, "prefix": …}``. How many there were."""
    request = request_of("POST", "v1", "users", "bindings:import", ndjson=lines)
    return Call(request, answers.imported)


def show_default() -> Call[str]:
    """The prefix of users without a binding."""
    return Call(request_of("GET", "v1", "default", "prefix"), answers.default_prefix)


def set_default(prefix: str) -> Call[str]:
    """Let users without a binding have a prefix from now on."""
    request = request_of("PUT", "v1", "default", "prefix", json={"prefix": prefix})
    return Call(request, answers.default_prefix)


def remove_default() -> Call[None]:
    """No default any more: users without a binding get the base."""
    return Call(request_of("DELETE", "v1", "default", "prefix"), answers.nothing)
