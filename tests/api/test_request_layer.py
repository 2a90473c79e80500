"""Every request gets an id, a log line without secrets, and is counted in the metrics."""

import re
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of, put_text

CANARY = "canary-4711"
BLOCKS = ("nothing", "prefixes", "sequences")


def test_request_id_is_generated_or_taken_from_the_header(client: TestClient) -> None:
    generated = client.get("/health/live").headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{32}", generated)
    taken = client.get("/health/live", headers={"x-request-id": "mine-1.2_3"})
    assert taken.headers["x-request-id"] == "mine-1.2_3"
    for bad in ("a b", "a" * 65, "<script>", ""):
        answer = client.get("/health/live", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req-")


def test_one_log_line_for_each_request_without_secrets(client: TestClient, world: World) -> None:
    with structlog.testing.capture_logs() as lines:
        client.put(f"/v1/prefixes/{CANARY}", json={"kind": "text", "text": CANARY})
        body = {"model": CANARY, "prompt": CANARY, "user": CANARY}
        client.post("/v1/completions", json=body)
        client.post(f"/v1/completions?q={CANARY}", json=body)
        client.post("/v1/completions", json={"prompt": CANARY, CANARY: CANARY})
        client.get("/v1/models", headers={"authorization": f"Bearer {CANARY}"})
        client.get(f"/{CANARY}")
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("PUT", "/v1/prefixes/{name}", 201),
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 400),
        ("POST", "/v1/completions", 400),
        ("GET", "/v1/models", 401),
        ("GET", "unknown", 404),
    ]
    assert [line.get("tenant") for line in requests] == ["acme"] * 4 + [None, None]
    assert CANARY not in repr(lines)
    assert world.keys["acme"] not in repr(lines)
    assert CANARY not in client.get("/metrics").text


def test_uncaught_exception_is_a_500_without_details(client: TestClient, world: World) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError(CANARY)

    world.store.list = broken  # type: ignore[assignment,method-assign]
    answer = client.get("/v1/prefixes")
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert CANARY not in answer.text


def test_metrics_count_requests_and_engine_work(client: TestClient, world: World) -> None:
    for name in ("a", "b"):
        put_text(client, name, f"prefix {name}", world.headers())
    for model in ("a", "b", "tiny", "absent"):
        client.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 4})
    client.request("BREW", "/v1/models")
    page = client.get("/metrics").text
    samples = dict(
        line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#")
    )
    ok = 'endpoint="completions",outcome="ok"'
    assert samples[f"prefixd_generation_requests_total{{{ok}}}"] == "3.0"
    refused = 'endpoint="completions",outcome="refused"'
    assert samples[f"prefixd_generation_requests_total{{{refused}}}"] == "1.0"
    assert samples[f"prefixd_e2e_request_latency_seconds_count{{{ok}}}"] == "3.0"
    of_endpoint = '_seconds_count{endpoint="completions"}'
    assert samples[f"prefixd_time_to_first_token{of_endpoint}"] == "3.0"
    assert samples[f"prefixd_time_per_output_token{of_endpoint}"] == "9.0"  # 4 tokens, 3 gaps
    assert samples["prefixd_generation_tokens_total"] == "12.0"
    assert samples["prefixd_kv_cache_usage_perc"] == str(2 / 32)  # a block of each prefix
    holds = {what: samples[f'prefixd_kv_blocks{{holds="{what}"}}'] for what in BLOCKS}
    assert holds == {"nothing": "30.0", "prefixes": "2.0", "sequences": "0.0"}
    assert samples["prefixd_distinct_prefixes_per_step_max"] == "1.0"
    steps = float(samples["prefixd_steps_total"])
    assert float(samples['prefixd_distinct_prefixes_per_step_bucket{le="+Inf"}']) == steps
    with_prefix = steps - float(samples['prefixd_distinct_prefixes_per_step_bucket{le="0.0"}'])
    assert float(samples["prefixd_distinct_prefixes_per_step_sum"]) == with_prefix
    assert 'method="OTHER"' in page
    assert "acme" not in page


def test_applications_do_not_share_metrics(client: TestClient, world: World) -> None:
    from prefixd.server.api.metrics import Metrics

    other = Metrics(world.engine.stats, world.disk, world.served.decoder)
    client.get("/health/live")
    assert b"prefixd_http_requests_total{" not in other.render()


def test_openapi_document_declares_bodies_and_errors(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/(\w+)", repr(document)))
    assert references <= set(schemas)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/v1/"):
                assert operation["security"]
                for status in ("400", "401", "403", "404"):
                    schema = operation["responses"][status]["content"]["application/json"]
                    expected = "AnthropicErrorBody" if "/messages" in path else "ErrorBody"
                    assert schema["schema"]["$ref"].endswith(f"/{expected}")
    upload = document["paths"]["/v1/prefixes/{name}"]["put"]["requestBody"]["content"]
    assert set(upload) == {"application/json", "multipart/form-data", "application/octet-stream"}
    completion = schemas["CompletionRequest"]
    assert completion["additionalProperties"] is False
    assert all(
        field.get("description") or field.get("enum") or name
        for name, field in completion["properties"].items()
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/prefixes/x"])
def test_declared_length_above_the_limit_is_refused_before_reading(
    client: TestClient, path: str
) -> None:
    answer = client.request(
        "PUT" if "prefixes" in path else "POST",
        path,
        content=b"x" * 70_000,
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    error_of(answer)
