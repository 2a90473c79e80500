"""One request for generation: what was admitted, and what metrics, log and trace report of it."""

import time
from asyncio import CancelledError
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Protocol, Self

from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.engine.request import AdmittedRequest, FinishEvent
from prefixd.server.errors import DeadlineExceeded, PrefixdError, Unavailable
from prefixd.server.tenants.bindings import ChosenBy
from prefixd.store.errors import BlobsUnavailable, CorruptArtifact, StoreError
from prefixd.store.store import Manifest

_SHORT_DIGEST = 12


@dataclass(frozen=True, slots=True)
class ResolvedPrefix:
    """A version of a prefix and why it was chosen."""

    manifest: Manifest
    chosen_by: ChosenBy


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that fits: one ``AdmittedRequest`` for each prompt, all under the same prefix.

    ``model`` is the caller's name for it; ``prefix`` is None for the bare base. Choice
    ``i * n + j`` of the response is sequence ``j`` of request ``i``.
    """

    id: str
    model: str
    prefix: ResolvedPrefix | None
    requests: tuple[AdmittedRequest, ...]

    @property
    def num_choices(self) -> int:
        """Number of sequences of all requests."""
        return len(self.requests) * self.requests[0].n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once, without virtual tokens."""
        return sum(len(request.prompt) for request in self.requests)


class ClientGone(Exception):
    """The client closed the connection before its response was complete."""


class Endpoint(StrEnum):
    """The routes that generate."""

    COMPLETIONS = "completions"
    CHAT = "chat_completions"


class Outcome(StrEnum):
    """How a request for generation ended. REFUSED: an error of the caller. UNAVAILABLE: the server
    is full, starting, stopping or without its storage. ABORTED: the client disconnected."""

    OK = "ok"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    ERROR = "error"

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """The outcome of a request that raised ``error``; its task may have been cancelled."""
        match error:
            case ClientGone() | CancelledError() | GeneratorExit():
                return cls.ABORTED
            case Unavailable() | BlobsUnavailable() | SQLAlchemyError():
                return cls.UNAVAILABLE
            case DeadlineExceeded():
                return cls.TIMEOUT
            case PrefixdError() if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                return cls.REFUSED
            case StoreError() if not isinstance(error, CorruptArtifact):
                return cls.REFUSED
            case _:
                return cls.ERROR


class TenantClass(StrEnum):
    """Tenants grouped by weight: a label with a fixed number of values."""

    LOW = "low"
    STANDARD = "standard"
    HIGH = "high"

    @classmethod
    def of(cls, weight: float) -> Self:
        """The class of a tenant of ``weight``: below, at or above 1."""
        if weight == 1:
            return cls.STANDARD
        return cls.LOW if weight < 1 else cls.HIGH


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request for generation, for metrics, log, trace and ``usage``. No prompt and no text.

    ``at_ns`` is Unix time; ``trace_context`` are the W3C headers as received; ``admitted`` is None
    when the request was refused. Times in seconds: ``queue`` is from submission until the first
    sequence began to run, ``first_token`` and ``total`` count from arrival; None when that point
    was not reached. ``generated_tokens`` counts the tokens received from the engine.
    """

    endpoint: Endpoint
    tenant: str
    tenant_class: TenantClass
    served_model: str
    request_id: str | None = None
    stream: bool = False
    trace_context: Mapping[str, str] = field(default_factory=dict)
    at_ns: int = field(default_factory=time.time_ns)
    admitted: Admitted | None = None
    outcome: Outcome = Outcome.OK
    error_code: str | None = None
    generated_tokens: int = 0
    queue: float | None = None
    first_token: float | None = None
    total: float = 0.0
    finished: dict[int, FinishEvent] = field(default_factory=dict)

    def sequence_finished(self, choice: int, event: FinishEvent) -> None:
        """One sequence of the request ended."""
        self.finished[choice] = event
        if event.queue_s is not None:
            self.queue = event.queue_s if self.queue is None else min(self.queue, event.queue_s)

    @property
    def num_choices(self) -> int:
        """Sequences of the request; 0 when it was refused."""
        return self.admitted.num_choices if self.admitted else 0

    @property
    def completion_tokens(self) -> int:
        """Tokens of the sequences that ended."""
        return sum(event.completion_tokens for event in self.finished.values())

    @property
    def output_tokens(self) -> int:
        """Tokens of all sequences, whether they ended or not."""
        return max(self.generated_tokens, self.completion_tokens)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was shared and not computed.

        A prompt counts once for its n sequences, with the least that any of them shared: the later
        ones share what the first computed.
        """
        cached: dict[int, int] = {}
        n = self.admitted.requests[0].n if self.admitted else 1
        for choice, event in self.finished.items():
            prompt = choice // n
            cached[prompt] = min(cached.get(prompt, event.cached_tokens), event.cached_tokens)
        return sum(cached.values())

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Why the sequences ended, in the order of the choices."""
        return tuple(event.reason.value for _, event in sorted(self.finished.items()))

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object of the response; virtual tokens are not included."""
        prompt_tokens = self.admitted.prompt_tokens if self.admitted else 0
        completion_tokens = self.completion_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def log_fields(self) -> dict[str, Any]:
        """Fields of the log line that are known; no names that tenants chose."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "tenant": self.tenant,
            "endpoint": self.endpoint.value,
            "stream": self.stream,
            "outcome": self.outcome.value,
            "code": self.error_code,
            "queue_seconds": self.queue,
            "first_token_seconds": self.first_token,
            "seconds": self.total,
        }
        if self.admitted is not None:
            prefix = self.admitted.prefix.manifest if self.admitted.prefix else None
            fields |= {
                "id": self.admitted.id,
                "prefix": prefix.digest[:_SHORT_DIGEST] if prefix else None,
                "virtual_tokens": prefix.num_virtual_tokens if prefix else 0,
                "choices": self.admitted.num_choices,
                "prompt_tokens": self.admitted.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
                "finish_reasons": list(self.finish_reasons),
            }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in fields.items()
            if value is not None
        }


class Tracer(Protocol):
    """A further destination of records, in addition to metrics and log."""

    def __call__(self, record: RequestRecord) -> None:
        """Export a record. Must neither block nor raise."""
        ...

    def close(self) -> None:
        """Flush what was exported, and accept nothing more."""
        ...
