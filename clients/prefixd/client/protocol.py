"""The REST protocol without I/O: requests as plain data, answers as types.

Every operation is one function that returns a ``Call``: what to send, and how to read the answer.
The shells (``prefixd.client.sync`` and ``prefixd.client.aio``) send it; neither knows an endpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from prefixd.client import answers, streams
from prefixd.client.types import (
    Completion,
    Model,
    Prefix,
    PrefixPage,
    Uploaded,
    VersionPage,
    Warmed,
)

T = TypeVar("T")
Message = Mapping[str, str]


class Sampling(TypedDict, total=False):
    """How the next token is chosen and when to stop; names as in the OpenAI API and vLLM.

    ``priority`` orders the tenant's own requests, the lowest first; after ``timeout`` seconds the
    server gives up (``DeadlineError``); ``kv_reuse`` off shares no KV with other requests.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    n: int
    user: str
    priority: int
    timeout: float
    kv_reuse: bool


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a multipart body. A ``Path`` is opened by the shell and streamed."""

    name: str
    filename: str
    content: bytes | Path
    content_type: str


@dataclass(frozen=True, slots=True)
class Request:
    """What to send, relative to the server's URL. ``json``, ``ndjson`` and ``parts`` exclude each
    other."""

    method: str
    path: str
    params: Mapping[str, str | int]
    json: Mapping[str, object] | None = None
    parts: tuple[Part, ...] = ()
    ndjson: bytes | None = None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request and the reading of its answer; ``parse`` raises for a refusal."""

    request: Request
    parse: Callable[[answers.Response], T]


@dataclass(frozen=True, slots=True)
class StreamCall:
    """A request that is answered by server-sent events, and the reading of one event's choice."""

    request: Request
    parse: streams.ChoiceParser


# ── Prefixes ─────────────────────────────────────────────────────────────────────────────────


def upload(
    name: str,
    *,
    config: bytes | Path,
    weights: bytes | Path,
    metadata: Mapping[str, object] | None = None,
    warm: bool = False,
) -> Call[Uploaded]:
    """Upload a PEFT prefix as a new version of ``name``: its config (JSON) and safetensors.

    ``warm`` has the server that takes it make it resident at once.
    """
    parts = [
        Part("config", "adapter_config.json", config, "application/json"),
        Part("weights", "adapter_model.safetensors", weights, "application/octet-stream"),
    ]
    if metadata is not None:
        encoded = answers.dump(metadata)
        parts.append(Part("metadata", "metadata.json", encoded, "application/json"))
    request = request_of(
        "PUT", "v1", "prefixes", name, params=_warming(warm=warm), parts=tuple(parts)
    )
    return Call(request, answers.uploaded)


def _warming(*, warm: bool) -> dict[str, str | int]:
    return {"warm": "true"} if warm else {}


def upload_folder(
    name: str,
    folder: Path,
    *,
    metadata: Mapping[str, object] | None = None,
    warm: bool = False,
) -> Call[Uploaded]:
    """Upload what PEFT's ``save_pretrained`` wrote into ``folder`` as a new version of ``name``."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    return upload(name, config=config, weights=weights, metadata=metadata, warm=warm)


def upload_text(
    name: str,
    text: str,
    *,
    metadata: Mapping[str, object] | None = None,
    warm: bool = False,
) -> Call[Uploaded]:
    """Upload a text as a new version of ``name``: a hard prompt, compiled once like any other."""
    body: dict[str, object] = {"kind": "text", "text": text}
    if metadata is not None:
        body["metadata"] = metadata
    request = request_of("PUT", "v1", "prefixes", name, params=_warming(warm=warm), json=body)
    return Call(request, answers.uploaded)


def list_prefixes(*, limit: int | None = None, after: str | None = None) -> Call[PrefixPage]:
    """The tenant's prefixes by name, the latest version of each, a page at a time."""
    params: dict[str, str | int] = {}
    if limit is not None:
        params["limit"] = limit
    if after is not None:
        params["after"] = after
    return Call(request_of("GET", "v1", "prefixes", params=params), answers.prefix_page)


def show_prefix(name: str) -> Call[Prefix]:
    """The manifest behind a name (``name``, ``name@3`` or ``name@alias``)."""
    return Call(request_of("GET", "v1", "prefixes", name), answers.prefix)


def list_versions(
    name: str, *, limit: int | None = None, before: int | None = None
) -> Call[VersionPage]:
    """Versions of a prefix, newest first, a page at a time."""
    given = {"limit": limit, "before": before}
    params = {name: value for name, value in given.items() if value is not None}
    request = request_of("GET", "v1", "prefixes", name, "versions", params=params)
    return Call(request, answers.version_page)


def set_alias(name: str, alias: str, *, version: int) -> Call[Prefix]:
    """Let ``name@alias`` mean a version from now on."""
    request = request_of("PUT", "v1", "prefixes", name, "aliases", alias, json={"version": version})
    return Call(request, answers.prefix)


def remove_alias(name: str, alias: str) -> Call[None]:
    """Forget an alias; the version stays."""
    return Call(request_of("DELETE", "v1", "prefixes", name, "aliases", alias), answers.nothing)


def warm(reference: str) -> Call[Warmed]:
    """Have the server make a version resident (``name``, ``name@3`` or ``name@alias``) before
    anybody asks for it; returns at once."""
    return Call(request_of("POST", "v1", "prefixes", reference, "warm"), answers.warmed)


def pin(reference: str) -> Call[Prefix]:
    """Have servers keep the version that a reference means now resident, in place of any other
    version of its prefix."""
    return Call(request_of("PUT", "v1", "prefixes", reference, "pin"), answers.prefix)


def unpin(name: str) -> Call[None]:
    """Let a pinned prefix go from residency as others do."""
    return Call(request_of("DELETE", "v1", "prefixes", name, "pin"), answers.nothing)


def delete_prefix(name: str) -> Call[None]:
    """Delete a prefix with all its versions and aliases."""
    return Call(request_of("DELETE", "v1", "prefixes", name), answers.nothing)


# ── Generation ───────────────────────────────────────────────────────────────────────────────


def complete(
    prompt: str | Sequence[int], *, model: str, **sampling: Unpack[Sampling]
) -> Call[Completion]:
    """Continue a prompt (text or token ids) under a prefix reference or the bare base."""
    body: dict[str, object] = {"model": model, "prompt": prompt, **sampling}
    return Call(request_of("POST", "v1", "completions", json=body), answers.completion)


def chat(
    messages: Sequence[Message], *, model: str, **sampling: Unpack[Sampling]
) -> Call[Completion]:
    """Answer a conversation under a prefix reference or the bare base."""
    body = {"model": model, "messages": list(messages), **sampling}
    return Call(request_of("POST", "v1", "chat", "completions", json=body), answers.chat)


def stream_complete(
    prompt: str | Sequence[int], *, model: str, **sampling: Unpack[Sampling]
) -> StreamCall:
    """Like ``complete``, a chunk at a time."""
    body = {"model": model, "prompt": prompt, **sampling, **_STREAMED}
    return StreamCall(request_of("POST", "v1", "completions", json=body), streams.text_piece)


def stream_chat(
    messages: Sequence[Message], *, model: str, **sampling: Unpack[Sampling]
) -> StreamCall:
    """Like ``chat``, a chunk at a time."""
    body = {"model": model, "messages": list(messages), **sampling, **_STREAMED}
    return StreamCall(
        request_of("POST", "v1", "chat", "completions", json=body), streams.chat_piece
    )


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


# ── The server ───────────────────────────────────────────────────────────────────────────────


def list_models() -> Call[tuple[Model, ...]]:
    """What the ``model`` field takes: the base first, then the caller's prefixes."""
    return Call(request_of("GET", "v1", "models"), answers.models)


def metrics() -> Call[str]:
    """The server's counters in the Prometheus text format."""
    return Call(request_of("GET", "metrics"), answers.text)


def is_live() -> Call[bool]:
    """Whether the process answers."""
    return Call(request_of("GET", "health", "live"), answers.is_healthy)


def is_ready() -> Call[bool]:
    """Whether the server takes requests: the model is loaded and the engine runs."""
    return Call(request_of("GET", "health", "ready"), answers.is_healthy)


def request_of(
    method: str,
    *path: str,
    params: Mapping[str, str | int] | None = None,
    json: Mapping[str, object] | None = None,
    parts: tuple[Part, ...] = (),
    ndjson: bytes | None = None,
) -> Request:
    """A request; each of ``path`` is one segment."""
    # A name with a slash or a question mark must stay one segment: the server then refuses it.
    joined = "/" + "/".join(quote(segment, safe="@:") for segment in path)
    return Request(
        method=method, path=joined, params=params or {}, json=json, parts=parts, ndjson=ndjson
    )
