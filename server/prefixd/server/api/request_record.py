"""What is known of one request for generation when it has ended, for figures, log and trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from typing import Any, Protocol, Self

from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.errors import DeadlineExceeded, PrefixdError, Unavailable
from prefixd.store.errors import BlobsUnavailable, CorruptArtifact, StoreError

_SHORT_DIGEST = 12


class Endpoint(StrEnum):
    """The routes that generate."""

    COMPLETIONS = "completions"
    CHAT = "chat_completions"


class Outcome(StrEnum):
    """How a request for generation ended: REFUSED is the caller's doing, UNAVAILABLE a server that
    is full, starting, ending or without its storage, ABORTED a client that left."""

    OK = "ok"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    ERROR = "error"

    @classmethod
    def of(cls, error: Exception) -> Self:
        """The outcome of a request that is answered with ``error``, or for which it was raised."""
        match error:
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
    """Tenants by their weight, for labels: as many values as that, however many tenants."""

    LOW = "low"
    STANDARD = "standard"
    HIGH = "high"

    @classmethod
    def of(cls, weight: float) -> Self:
        """The class of a tenant of ``weight``: beneath, at or above 1."""
        if weight == 1:
            return cls.STANDARD
        return cls.LOW if weight < 1 else cls.HIGH


@dataclass(frozen=True, slots=True)
class Started:
    """What is known when a request arrives. ``at_ns`` is Unix time; ``trace`` are its headers of
    W3C trace context, as they came."""

    endpoint: Endpoint
    tenant: str
    tenant_class: TenantClass
    request_id: str | None
    stream: bool
    at_ns: int
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Taken:
    """What admission made of it. ``model`` is what the caller called it and ``served_model`` the
    base; ``digest`` is the prefix's."""

    id: str
    model: str
    served_model: str
    digest: str | None
    virtual_tokens: int
    choices: int
    max_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that has ended. Times in seconds; ``queue`` is from submission until its first
    sequence began to run, ``first_token`` and ``total`` count from arrival; all None where it did
    not come to that. No prompt and no text."""

    started: Started
    taken: Taken | None
    outcome: Outcome
    error_code: str | None
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    queue: float | None
    first_token: float | None
    total: float
    finish_reasons: tuple[str, ...]

    def log_fields(self) -> dict[str, Any]:
        """For a log line: what is None is left out, and so is every name that a tenant gave."""
        started, taken = self.started, self.taken
        fields: dict[str, Any] = {
            "request_id": started.request_id,
            "tenant": started.tenant,
            "endpoint": started.endpoint.value,
            "stream": started.stream,
            "outcome": self.outcome.value,
            "code": self.error_code,
            "queue_seconds": _rounded(self.queue),
            "first_token_seconds": _rounded(self.first_token),
            "seconds": _rounded(self.total),
        }
        if taken is not None:
            fields |= {
                "id": taken.id,
                "prefix": taken.digest and taken.digest[:_SHORT_DIGEST],
                "virtual_tokens": taken.virtual_tokens,
                "choices": taken.choices,
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
                "finish_reasons": list(self.finish_reasons),
            }
        return {name: value for name, value in fields.items() if value is not None}


class Tracer(Protocol):
    """Where records go on to, beside figures and log."""

    def __call__(self, record: RequestRecord) -> None:
        """Take one. Must neither block nor raise."""
        ...

    def close(self) -> None:
        """Pass on what was taken, and take no more."""
        ...


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
