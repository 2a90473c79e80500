"""Reading the server's answers: the half of the protocol that comes back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from prefixd.client.errors import ApiError, ProtocolError, error_class
from prefixd.client.types import (
    Binding,
    BindingPage,
    Choice,
    Completion,
    Model,
    Prefix,
    PrefixPage,
    PrefixUsed,
    Uploaded,
    Usage,
    VersionPage,
    Warmed,
    manifests,
)
from prefixd.client.wire import as_object, load_object, maybe, objects, read


@dataclass(frozen=True, slots=True)
class Response:
    """An answer as plain data; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def dump(value: Mapping[str, object]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def refusal(response: Response) -> ApiError:
    """The error a response of status 400 or more stands for."""
    try:
        error = as_object(load_object(response.body).get("error"))
        found = described(error, status=response.status)
    except ProtocolError:  # a proxy's page, not ours: the status still says something
        message = f"the server answered {response.status} without saying why"
        found = error_class(response.status)(message, status=response.status)
    found.request_id = found.request_id or response.headers.get("x-request-id")
    found.retry_after = _seconds(response.headers.get("retry-after"))
    return found


def described(error: Mapping[str, object], *, status: int) -> ApiError:
    """The error that an OpenAI-shaped error object describes."""
    return error_class(status)(
        read(error, "message", str),
        status=status,
        code=maybe(error, "code", str),
        type=maybe(error, "type", str),
        param=maybe(error, "param", str),
        request_id=maybe(error, "request_id", str),
    )


def prefix_used(headers: Mapping[str, str]) -> PrefixUsed | None:
    """The prefix named by a generation's headers; None under the bare base."""
    reference, digest = headers.get("x-prefixd-prefix"), headers.get("x-prefixd-prefix-digest")
    if not reference or not digest:
        return None
    name, _, version = reference.rpartition("@")
    if not name or not version.isdecimal():
        raise ProtocolError(f"expected x-prefixd-prefix to be name@version, not {reference!r}")
    why = headers.get("x-prefixd-prefix-chosen-by")
    return PrefixUsed(name=name, version=int(version), digest=digest, chosen_by=why)


def _accepted(response: Response) -> Response:
    if response.status >= 400:
        raise refusal(response)
    if response.status >= 300:
        raise ProtocolError(f"expected an answer, the server redirects ({response.status})")
    return response


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:  # the header may also hold a date; our server sends seconds
        return None


# ── Whole answers ────────────────────────────────────────────────────────────────────────────


def body_of(response: Response) -> Mapping[str, object]:
    """The JSON object of an answer; raises the refusal that it is."""
    return load_object(_accepted(response).body)


def uploaded(response: Response) -> Uploaded:
    """The manifest, and whether a version was made (201) or was there already (200)."""
    return Uploaded(prefix=Prefix.from_wire(body_of(response)), created=response.status == 201)


def prefix(response: Response) -> Prefix:
    """One manifest."""
    return Prefix.from_wire(body_of(response))


def warmed(response: Response) -> Warmed:
    """Where a version is on its way to the pool."""
    return Warmed.from_wire(body_of(response))


def prefix_page(response: Response) -> PrefixPage:
    """A page of manifests."""
    body = body_of(response)
    return PrefixPage(prefixes=manifests(body), next_after=maybe(body, "next_after", str))


def version_page(response: Response) -> VersionPage:
    """A page of one name's manifests."""
    body = body_of(response)
    return VersionPage(versions=manifests(body), next_before=maybe(body, "next_before", int))


def models(response: Response) -> tuple[Model, ...]:
    """The names the ``model`` field takes."""
    return tuple(Model.from_wire(entry) for entry in objects(body_of(response), "data"))


def binding(response: Response) -> Binding:
    """One binding."""
    return Binding.from_wire(body_of(response))


def binding_page(response: Response) -> BindingPage:
    """A page of bindings."""
    body = body_of(response)
    found = tuple(Binding.from_wire(entry) for entry in objects(body, "data"))
    return BindingPage(bindings=found, next_after=maybe(body, "next_after", str))


def imported(response: Response) -> int:
    """How many bindings an import held."""
    return read(body_of(response), "imported", int)


def default_prefix(response: Response) -> str:
    """The reference of users without a binding."""
    return read(body_of(response), "prefix", str)


def text(response: Response) -> str:
    """The body as text."""
    return _accepted(response).body.decode("utf-8", errors="replace")


def nothing(response: Response) -> None:
    """Nothing but the absence of a refusal."""
    _accepted(response)


def is_healthy(response: Response) -> bool:
    """200 is yes and 503 is no; anything else is another program's answer."""
    if response.status not in {200, 503}:
        _accepted(response)
    return response.status == 200


def completion(response: Response) -> Completion:
    """The answer of ``/v1/completions``."""
    body = body_of(response)
    return _generation(body, response, [_text_choice(entry) for entry in objects(body, "choices")])


def chat(response: Response) -> Completion:
    """The answer of ``/v1/chat/completions``."""
    body = body_of(response)
    choices = [_chat_choice(entry) for entry in objects(body, "choices")]
    return _generation(body, response, choices)


def _generation(
    body: Mapping[str, object], response: Response, choices: list[Choice]
) -> Completion:
    if not choices:
        raise ProtocolError("expected at least one choice, the server sent none")
    usage, used = body.get("usage"), body.get("prefix")
    return Completion(
        id=read(body, "id", str),
        model=read(body, "model", str),
        choices=tuple(sorted(choices, key=lambda choice: choice.index)),
        usage=None if usage is None else Usage.from_wire(as_object(usage)),
        prefix=None if used is None else PrefixUsed.from_wire(as_object(used)),
        request_id=response.headers.get("x-request-id"),
    )


def _text_choice(entry: Mapping[str, object]) -> Choice:
    return Choice(
        index=read(entry, "index", int),
        text=read(entry, "text", str),
        finish_reason=maybe(entry, "finish_reason", str),
        logprobs=maybe(entry, "logprobs", dict),
    )


def _chat_choice(entry: Mapping[str, object]) -> Choice:
    return Choice(
        index=read(entry, "index", int),
        text=maybe(as_object(entry.get("message")), "content", str) or "",
        finish_reason=maybe(entry, "finish_reason", str),
        logprobs=maybe(entry, "logprobs", dict),
    )
