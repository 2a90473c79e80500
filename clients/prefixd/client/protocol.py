"""The REST protocol without I/O: requests as plain data, responses as models.

Every operation is one function that returns a ``Call``: what to send, and how to parse the
response. The clients (``prefixd.client.sync`` and ``prefixd.client.aio``) send it and know no
endpoint.
"""

from prefixd.client.protocol_generation import (
    FunctionName,
    Message,
    NamedTool,
    Sampling,
    chat,
    complete,
    stream_chat,
    stream_complete,
)
from prefixd.client.protocol_prefixes import (
    Bases,
    delete_prefix,
    delete_version,
    download_artifact,
    list_prefixes,
    list_versions,
    patch_metadata,
    patch_recipe,
    pin,
    remove_alias,
    rollback,
    set_alias,
    set_recipe,
    show_prefix,
    unpin,
    upload,
    upload_artifact,
    upload_composition,
    upload_text,
    warm,
)
from prefixd.client.types import Model, ModelList
from prefixd.client.wire import Call, Response, accepted, parse_body, parser, request_of

__all__ = [
    "Bases",
    "FunctionName",
    "Message",
    "NamedTool",
    "Sampling",
    "chat",
    "complete",
    "delete_prefix",
    "delete_version",
    "download_artifact",
    "is_live",
    "is_ready",
    "list_models",
    "list_prefixes",
    "list_versions",
    "metrics",
    "patch_metadata",
    "patch_recipe",
    "pin",
    "remove_alias",
    "rollback",
    "set_alias",
    "set_recipe",
    "show_model",
    "show_prefix",
    "stream_chat",
    "stream_complete",
    "unpin",
    "upload",
    "upload_artifact",
    "upload_composition",
    "upload_text",
    "warm",
]


def list_models() -> Call[tuple[Model, ...]]:
    """The values of the ``model`` field: the base first, then the tenant's prefixes."""
    return Call(request_of("GET", "v1", "models"), _models)


def show_model(model: str) -> Call[Model]:
    """One value of the ``model`` field, with the recipe of its prefix."""
    return Call(request_of("GET", "v1", "models", model), parser(Model))


def metrics() -> Call[str]:
    """The server's counters in the Prometheus text format."""
    return Call(request_of("GET", "metrics"), _text)


def is_live() -> Call[bool]:
    """Whether the process responds."""
    return Call(request_of("GET", "health", "live"), _is_healthy)


def is_ready() -> Call[bool]:
    """Whether the server accepts requests: the model is loaded and the engine runs."""
    return Call(request_of("GET", "health", "ready"), _is_healthy)


def _models(response: Response) -> tuple[Model, ...]:
    return parse_body(ModelList, response).data


def _text(response: Response) -> str:
    return accepted(response).body.decode("utf-8", errors="replace")


def _is_healthy(response: Response) -> bool:
    if response.status not in {200, 503}:  # another program's response
        accepted(response)
    return response.status == 200
