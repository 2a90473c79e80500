"""docs/operations.md lists exactly what /metrics exports."""

import re
from pathlib import Path

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.api.api_world import World, put_text
from tests.api.test_completions import complete

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ROW = re.compile(r"^\| `(prefixd_\w+)` \| (\w+) \|(.*?) \| (.+?) \|$", re.MULTILINE)
BOUNDED = 8
"""Largest number of values of a label, except routes and statuses, which the code limits."""


def listed() -> dict[str, tuple[str, frozenset[str]]]:
    rows = ROW.findall(PAGE.read_text("utf-8"))
    assert len({name for name, *_ in rows}) == len(rows)
    return {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows
    }


def test_operations_page_lists_all_exported_metrics(client: TestClient, world: World) -> None:
    for name in ("a", "b"):
        put_text(client, name, f"prefix {name}", world.headers())
        complete(client, model=name)
    complete(client, model="absent")
    exported = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        suffix = "_total" if family.type == "counter" else ""
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.samples, family.name
        assert family.documentation.endswith("."), family.name
        exported[f"{family.name}{suffix}"] = (family.type, frozenset(labels))
    assert exported == listed()


def test_number_of_series_does_not_grow_with_tenants_and_prefixes(
    client: TestClient, world: World
) -> None:
    for number in range(12):
        world.add_tenant(f"t{number}")
        world.tenants.set_settings(f"t{number}", {"weight": 0.5 + number / 10})
        headers = world.headers(f"t{number}")
        put_text(client, f"p{number}", f"prefix {number}", headers)
        body = {"model": f"p{number}", "prompt": "x", "max_tokens": 2}
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    values: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault((family.name, label), set()).add(value)
    grown = {place for place, seen in values.items() if place[1] != "le" and len(seen) > BOUNDED}
    assert grown == set()


def test_health_and_metrics_say_what_computes_the_model(client: TestClient, world: World) -> None:
    decoder = {"kernels": "fake", "device": "cpu", "dtype": "float32", "quantize": "none"}
    assert client.get("/health/ready").json()["decoder"] == decoder
    registry = world.metrics.registry
    empty = ("perplexity_ratio", "top1_agreement", "tensor_parallel", "weights")
    labels = decoder | dict.fromkeys(empty, "")
    assert registry.get_sample_value("prefixd_decoder_info", labels) == 1
