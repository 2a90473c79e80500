"""The operations of both clients, listed once. A client defines how a call is sent."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from prefixd.client import (
    folders,
    protocol,
    protocol_admin,
    protocol_batches,
    protocol_tokens,
    protocol_users,
    scores,
)
from prefixd.client.wire import Call, StreamCall

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Sender(Protocol):
    """A synchronous client."""

    def send(self, call: Call[T]) -> T: ...


class AsyncSender(Protocol):
    """An asynchronous client."""

    def send(self, call: Call[T]) -> Awaitable[T]: ...


class Streamer(Protocol[T_co]):
    """A client of either kind; ``T_co`` is its type of stream."""

    def stream(self, call: StreamCall) -> T_co: ...


class Method(Protocol[P, T_co]):
    """The type of a method that returns a ``T_co`` on a synchronous client, an awaitable of one on
    an asynchronous client."""

    @overload
    def __get__(self, client: Sender, owner: object = None) -> Callable[P, T_co]: ...
    @overload
    def __get__(
        self, client: AsyncSender, owner: object = None
    ) -> Callable[P, Awaitable[T_co]]: ...


class StreamMethod(Protocol[P]):
    """The type of a method that returns the stream type of its client."""

    def __get__(self, client: Streamer[T], owner: object = None) -> Callable[P, T]: ...


def _operation(build: Callable[P, Call[T]]) -> Method[P, T]:
    """A method with the signature and docstring of ``build`` that sends the call it returns."""

    @wraps(build)
    def method(client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return client.send(build(*args, **kwargs))

    return cast("Method[P, T]", method)


def _stream(build: Callable[P, StreamCall]) -> StreamMethod[P]:
    @wraps(build)
    def method(client: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return client.stream(build(*args, **kwargs))

    return cast("StreamMethod[P]", method)


class Operations:
    """Every operation of the REST API as a method."""

    upload = _operation(protocol.upload)
    upload_folder = _operation(folders.upload_folder)
    upload_content = _operation(folders.upload_content)
    upload_artifact = _operation(protocol.upload_artifact)
    download_artifact = _operation(protocol.download_artifact)
    upload_text = _operation(protocol.upload_text)
    upload_composition = _operation(protocol.upload_composition)
    list_prefixes = _operation(protocol.list_prefixes)
    show_prefix = _operation(protocol.show_prefix)
    list_versions = _operation(protocol.list_versions)
    patch_metadata = _operation(protocol.patch_metadata)
    patch_recipe = _operation(protocol.patch_recipe)
    set_recipe = _operation(protocol.set_recipe)
    set_alias = _operation(protocol.set_alias)
    rollback = _operation(protocol.rollback)
    remove_alias = _operation(protocol.remove_alias)
    warm = _operation(protocol.warm)
    pin = _operation(protocol.pin)
    unpin = _operation(protocol.unpin)
    delete_version = _operation(protocol.delete_version)
    delete_prefix = _operation(protocol.delete_prefix)

    complete = _operation(protocol.complete)
    chat = _operation(protocol.chat)
    stream_complete = _stream(protocol.stream_complete)
    stream_chat = _stream(protocol.stream_chat)
    loglikelihood = _operation(scores.loglikelihood)
    tokenize = _operation(protocol_tokens.tokenize)
    detokenize = _operation(protocol_tokens.detokenize)

    bind_user = _operation(protocol_users.bind_user)
    show_binding = _operation(protocol_users.show_binding)
    unbind_user = _operation(protocol_users.unbind_user)
    list_bindings = _operation(protocol_users.list_bindings)
    import_bindings = _operation(protocol_users.import_bindings)
    show_default = _operation(protocol_users.show_default)
    set_default = _operation(protocol_users.set_default)
    remove_default = _operation(protocol_users.remove_default)

    upload_file = _operation(protocol_batches.upload_file)
    list_files = _operation(protocol_batches.list_files)
    show_file = _operation(protocol_batches.show_file)
    read_file = _operation(protocol_batches.read_file)
    delete_file = _operation(protocol_batches.delete_file)
    create_batch = _operation(protocol_batches.create_batch)
    show_batch = _operation(protocol_batches.show_batch)
    list_batches = _operation(protocol_batches.list_batches)
    cancel_batch = _operation(protocol_batches.cancel_batch)

    list_models = _operation(protocol.list_models)
    show_model = _operation(protocol.show_model)
    metrics = _operation(protocol.metrics)
    is_live = _operation(protocol.is_live)
    is_ready = _operation(protocol.is_ready)

    list_tenants = _operation(protocol_admin.list_tenants)
    create_tenant = _operation(protocol_admin.create_tenant)
    show_tenant = _operation(protocol_admin.show_tenant)
    set_tenant = _operation(protocol_admin.set_tenant)
    set_quota = _operation(protocol_admin.set_quota)
    list_keys = _operation(protocol_admin.list_keys)
    create_key = _operation(protocol_admin.create_key)
    rotate_key = _operation(protocol_admin.rotate_key)
    revoke_key = _operation(protocol_admin.revoke_key)
    read_audit = _operation(protocol_admin.read_audit)
