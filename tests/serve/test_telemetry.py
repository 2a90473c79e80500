"""Spans: names and attributes, their trace, and what they must not contain."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from prefixd.server.serve.telemetry import Spans, open_tracer
from tests.api.api_world import World, put_text
from tests.api.canary_scenario import PROMPT, SECRET, TENSOR, TEXT, USER, generate, manage
from tests.api.test_completions import complete

ROOT = Path(__file__).parents[2]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traced(world: World, spans: InMemorySpanExporter) -> Iterator[TestClient]:
    """As ``client``, with spans."""
    app = world.make_app(trace=Spans(SimpleSpanProcessor(spans)))
    with TestClient(app, headers=world.headers(), raise_server_exceptions=False) as client:
        yield client


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


@pytest.mark.parametrize("stream", [True, False])
def test_a_generation_is_a_span(
    traced: TestClient, world: World, spans: InMemorySpanExporter, *, stream: bool
) -> None:
    manifest = put_text(traced, "voice", "acme's", world.headers())
    assert not spans.get_finished_spans()
    started = time.monotonic()
    answer = complete(traced, model="voice@1", n=2, temperature=0.5, stream=stream)
    seconds = time.monotonic() - started
    span = only(spans)
    assert span.name == "text_completion tiny"
    assert span.kind is SpanKind.SERVER
    assert span.status.status_code is StatusCode.UNSET
    assert span.resource.attributes["service.name"] == "prefixd"
    assert span.parent is None
    attributes: dict[str, Any] = dict(span.attributes or {})
    assert 0 < attributes.pop("gen_ai.server.time_to_first_token") < seconds
    assert str(attributes.pop("gen_ai.response.id")).startswith("cmpl-")
    attributes.pop("prefixd.queue_time", None)
    assert attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "prefixd",
        "gen_ai.request.stream": stream,
        "gen_ai.request.model": "voice@1",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ("length", "length"),
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 16,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "prefixd.outcome": "ok",
        "prefixd.request.id": answer.headers["x-request-id"],
        "prefixd.tenant": "acme",
        "prefixd.prefix.digest": manifest["digest"],
        "prefixd.prefix.virtual_tokens": 6,
    }
    assert span.start_time is not None
    assert span.end_time is not None
    assert 0 < span.end_time - span.start_time < 1e9 * (seconds + 1)  # of the wall clock


def test_a_span_belongs_to_the_trace_of_its_request(
    traced: TestClient, spans: InMemorySpanExporter
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    traced.post("/v1/chat/completions", json=body, headers={"traceparent": TRACEPARENT})
    span = only(spans)
    assert span.name == "chat tiny"
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-00", TRACEPARENT[:-3]])
def test_a_malformed_traceparent_is_ignored(
    traced: TestClient, spans: InMemorySpanExporter, header: str
) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    answer = traced.post("/v1/completions", json=body, headers={"traceparent": header})
    assert answer.status_code == 200
    assert only(spans).parent is None


def test_rejected_and_failed_requests_have_an_error_type(
    traced: TestClient, world: World, spans: InMemorySpanExporter
) -> None:
    complete(traced, model="absent")
    world.runner.fail = True
    complete(traced)
    rejected, failed = spans.get_finished_spans()
    assert rejected.name == "text_completion"
    assert rejected.status.status_code is StatusCode.UNSET
    assert (rejected.attributes or {})["error.type"] == "model_not_found"
    assert "absent" not in rejected.to_json()
    assert failed.status.status_code is StatusCode.ERROR
    assert (failed.attributes or {})["error.type"] == "engine_error"


def test_spans_contain_no_content_and_no_secret(
    traced: TestClient, world: World, spans: InMemorySpanExporter
) -> None:
    generate(traced, world)
    manage(traced, world)
    text = "\n".join(span.to_json() for span in spans.get_finished_spans())
    assert len(spans.get_finished_spans()) >= 5
    secrets = [key.split("_")[2] for key in world.keys.values()]
    for canary in (PROMPT, TEXT, USER, SECRET, str(TENSOR)[:7], *secrets):
        assert canary not in text


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "TRUE"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://c"},
    ],
)
def test_tracing_is_off_without_an_endpoint(environment: dict[str, str]) -> None:
    assert open_tracer(environment) is None


def test_disabled_tracing_imports_no_sdk() -> None:
    code = (
        "import sys; from prefixd.server.serve.telemetry import open_tracer; "
        "assert open_tracer({}) is None; "
        "loaded = [m for m in sys.modules if m.startswith('opentelemetry.sdk') or '.otlp' in m]; "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_a_missing_otel_extra_is_logged() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; "
        "from prefixd.server.serve.telemetry import open_tracer; "
        "assert open_tracer({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://c'}) is None"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        timeout=60,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "without the extra 'otel'" in process.stdout + process.stderr
    assert "pip install 'prefixd[otel]'" in process.stdout + process.stderr


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP collector on 127.0.0.1, and the requests it received."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            """Write no log."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", received
        finally:
            server.shutdown()
            thread.join()


def test_remaining_spans_are_sent_at_shutdown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        app = world.make_app(trace=open_tracer())
        with TestClient(app, headers=world.headers()) as client:
            assert complete(client).status_code == 200
    (resource,) = [spans for request in received for spans in request.resource_spans]
    names = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert names["service.name"] == "mine"
    assert [one.name for scope in resource.scope_spans for one in scope.spans] == [
        "text_completion tiny"
    ]


def test_an_unreachable_collector_does_not_delay_shutdown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.serve.telemetry._LAST_EXPORT_S", 0.1)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    before = set(threading.enumerate())
    app = world.make_app(trace=open_tracer())
    with TestClient(app, headers=world.headers()) as client:
        assert complete(client).status_code == 200
    # What still retries draws random numbers, which the tests of hypothesis would notice.
    for thread in set(threading.enumerate()) - before:
        thread.join()
