"""OpenTelemetry: one span for each generation, with the attributes of the GenAI conventions.

Needs the extra ``otel``. Off, without an import, unless the standard variables name an endpoint. A
span holds numbers and names, never a prompt, an answer or a key.
"""

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog

from prefixd.server.api.metrics import Endpoint, Outcome
from prefixd.server.api.request_record import RequestRecord, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

log = structlog.get_logger("prefixd")

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_OPERATIONS = {
    Endpoint.COMPLETIONS: "text_completion",
    Endpoint.CHAT: "chat",
    Endpoint.RESPONSES: "chat",
    Endpoint.MESSAGES: "chat",
    Endpoint.LOGLIKELIHOOD: "loglikelihood",
}
_FAILURES = frozenset({Outcome.ERROR, Outcome.TIMEOUT, Outcome.UNAVAILABLE})
_LAST_EXPORT_S = 2.0

Value = str | bool | int | float | tuple[str, ...]


def open_tracer(environment: Mapping[str, str] = os.environ) -> Tracer | None:
    """A tracer for the endpoint in the standard OTEL_* variables; None when they name no endpoint.

    OpenTelemetry's SDK reads endpoint, headers, sampling and batching from them.
    """
    if not _is_configured(environment):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - an extra
    except ImportError:
        log.warning(
            "no traces: OTEL_* is set, but prefixd was installed without the extra 'otel'",
            install="pip install 'prefixd[otel]'",
        )
        return None
    return Spans(BatchSpanProcessor(OTLPSpanExporter()))


def _is_configured(environment: Mapping[str, str]) -> bool:
    off = environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    return not off and exporter == "otlp" and any(environment.get(name) for name in _ENDPOINTS)


class Spans:
    """Makes a span of each request record and passes it to ``processor``."""

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - an extra
            TraceContextTextMapPropagator,
        )

        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "prefixd"}))
        # Separate from the global provider, which may hold the spans of other libraries.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("prefixd")
        self._context = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        """Make the span of a finished generation, in the trace of its request."""
        from opentelemetry.trace import SpanKind, StatusCode  # noqa: PLC0415 - an extra

        span = self._tracer.start_span(
            _name(record),
            context=self._context.extract(record.trace_context),
            kind=SpanKind.SERVER,
            attributes=span_attributes(record),
            start_time=record.at_ns,
        )
        if record.outcome in _FAILURES:
            span.set_status(StatusCode.ERROR)
        span.end(record.at_ns + round(record.total * 1e9))

    def close(self) -> None:
        """Send the remaining spans, with a timeout: the collector may be unreachable."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_LAST_EXPORT_S)


def _name(record: RequestRecord) -> str:
    operation = _OPERATIONS[record.endpoint]
    return operation if record.admitted is None else f"{operation} {record.served_model}"


def span_attributes(record: RequestRecord) -> dict[str, Value]:
    """The span's attributes, without those that are unknown."""
    attributes: dict[str, Value | None] = {
        "gen_ai.operation.name": _OPERATIONS[record.endpoint],
        "gen_ai.provider.name": "prefixd",
        "gen_ai.request.stream": record.stream,
        "gen_ai.server.time_to_first_token": record.first_token,
        "error.type": record.error_code,
        "prefixd.outcome": record.outcome.value,
        "prefixd.request.id": record.request_id,
        "prefixd.tenant": record.tenant,
        "prefixd.queue_time": record.queue,
    }
    admitted = record.admitted
    if admitted is not None:
        request = admitted.requests[0]
        prefix = admitted.prefix.manifest if admitted.prefix else None
        attributes |= {
            "gen_ai.request.model": admitted.model,
            "gen_ai.request.max_tokens": request.stop.max_tokens,
            "gen_ai.request.temperature": request.sampling.temperature,
            "gen_ai.request.choice.count": admitted.num_choices,
            "gen_ai.response.id": admitted.id,
            "gen_ai.response.model": record.served_model,
            "gen_ai.response.finish_reasons": record.finish_reasons,
            "gen_ai.usage.input_tokens": admitted.prompt_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "prefixd.prefix.digest": prefix.digest if prefix else None,
            "prefixd.prefix.virtual_tokens": prefix.num_virtual_tokens if prefix else 0,
        }
    return {name: value for name, value in attributes.items() if value is not None}
