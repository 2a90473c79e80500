"""The operations of both clients, listed once. A client says how one is sent."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from prefixd.client import protocol, protocol_admin
from prefixd.client.wire import Call, StreamCall

P = ParamSpec("P")
T = TypeVar("T")
S_co = TypeVar("S_co", covariant=True)


class Sender(Protocol):
    """A synchronous client."""

    def send(self, call: Call[T]) -> T: ...


class AsyncSender(Protocol):
    """An asynchronous client."""

    def send(self, call: Call[T]) -> Awaitable[T]: ...


class Streamer(Protocol[S_co]):
    """A client of either kind; ``S_co`` is its type of stream."""

    def stream(self, call: StreamCall) -> S_co: ...


class Operation(Generic[P, T]):
    """A method with the signature and docstring of ``build`` that sends the call it returns.

    On an asynchronous client the method returns an awaitable.
    """

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, client: Sender, owner: object = None) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncSender, owner: object = None) -> Callable[P, Awaitable[T]]: ...
    def __get__(self, client: Any, owner: object = None) -> Any:
        if client is None:
            return self

        @wraps(self._build)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client.send(self._build(*args, **kwargs))

        return method


class StreamOperation(Generic[P]):
    """As ``Operation``, for calls whose response is a stream."""

    def __init__(self, build: Callable[P, StreamCall]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def __get__(self, client: Streamer[S_co], owner: object = None) -> Callable[P, S_co]:
        @wraps(self._build)
        def method(*args: P.args, **kwargs: P.kwargs) -> S_co:
            return client.stream(self._build(*args, **kwargs))

        return method


class Operations:
    """Every operation of the REST API as a method."""

    upload = Operation(protocol.upload)
    upload_folder = Operation(protocol.upload_folder)
    upload_text = Operation(protocol.upload_text)
    list_prefixes = Operation(protocol.list_prefixes)
    show_prefix = Operation(protocol.show_prefix)
    list_versions = Operation(protocol.list_versions)
    set_alias = Operation(protocol.set_alias)
    remove_alias = Operation(protocol.remove_alias)
    warm = Operation(protocol.warm)
    pin = Operation(protocol.pin)
    unpin = Operation(protocol.unpin)
    delete_prefix = Operation(protocol.delete_prefix)

    complete = Operation(protocol.complete)
    chat = Operation(protocol.chat)
    stream_complete = StreamOperation(protocol.stream_complete)
    stream_chat = StreamOperation(protocol.stream_chat)

    bind_user = Operation(protocol.bind_user)
    show_binding = Operation(protocol.show_binding)
    unbind_user = Operation(protocol.unbind_user)
    list_bindings = Operation(protocol.list_bindings)
    import_bindings = Operation(protocol.import_bindings)
    show_default = Operation(protocol.show_default)
    set_default = Operation(protocol.set_default)
    remove_default = Operation(protocol.remove_default)

    list_models = Operation(protocol.list_models)
    metrics = Operation(protocol.metrics)
    is_live = Operation(protocol.is_live)
    is_ready = Operation(protocol.is_ready)

    list_tenants = Operation(protocol_admin.list_tenants)
    create_tenant = Operation(protocol_admin.create_tenant)
    show_tenant = Operation(protocol_admin.show_tenant)
    set_tenant = Operation(protocol_admin.set_tenant)
    set_quota = Operation(protocol_admin.set_quota)
    list_keys = Operation(protocol_admin.list_keys)
    create_key = Operation(protocol_admin.create_key)
    rotate_key = Operation(protocol_admin.rotate_key)
    revoke_key = Operation(protocol_admin.revoke_key)
    read_audit = Operation(protocol_admin.read_audit)
