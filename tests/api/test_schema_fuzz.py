"""Requests generated from the OpenAPI document, valid and invalid: no 5xx, and every response is as
the document says: status, content type, headers and body. The seed is fixed, the number bounded."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from prefixd.server.tenants.principal import OPERATOR_TENANT, Scope
from tests.api.api_world import World, make_world, put_text

EXAMPLES = 6
"""Of each operation, with each kind of data, on existing and on any resources."""

MODELS = (
    "CompletionRequest",
    "ChatRequest",
    "ResponsesRequest",
    "MessagesRequest",
    "CountRequest",
)
CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
]
REJECTED = {"negative_data_rejection": {"expected-statuses": ["4XX", "5XX"]}}
"""By default, 412 and 413 would be among the answers that accept a request."""

BOUNDED = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def operator_of(world: World) -> dict[str, str]:
    """Headers of a key that may do everything."""
    world.tenants.create_tenant(OPERATOR_TENANT)
    key = world.tenants.create_key(tenant=OPERATOR_TENANT, scopes=list(Scope))
    return {"Authorization": f"Bearer {key.text}"}


def known_resources(world: World, headers: dict[str, str]) -> dict[str, Any]:
    """Create one resource of each kind; the path parameters that name them."""
    client = TestClient(world.app, headers=headers)
    put_text(client, "support", "hello", headers)
    put_text(client, "support", "hello again", headers)
    client.put("/v1/users/ann/prefix", json={"prefix": "support"})
    client.put("/v1/default/prefix", json={"prefix": "support"})
    key = client.post("/v1/admin/keys", json={}).json()["key_id"]
    return {
        "name": "support",
        "reference": "support",
        "model": "support",
        "version": 1,
        "alias": "prod",
        "user": "ann",
        "tenant": "beta",
        "key_id": key,
    }


class Fuzzer:
    """Sends generated requests and checks each response; ``statuses`` counts them."""

    def __init__(self, world: World, headers: dict[str, str]) -> None:
        # Imported here: it takes a second, in each process that collects tests.
        import schemathesis
        from schemathesis.checks import CHECKS as ALL
        from schemathesis.checks import load_all_checks

        load_all_checks()

        @schemathesis.serializer("application/x-ndjson")
        def lines(_context: Any, value: Any) -> bytes:
            return value.encode("utf-8", "replace") if isinstance(value, str) else b"[]"

        self.checks = ALL.get_by_names(CHECKS)
        self.modes = tuple(schemathesis.GenerationMode)
        document = copy.deepcopy(world.app.openapi())
        for name in MODELS:  # otherwise almost all would be 404
            model = document["components"]["schemas"][name]["properties"]["model"]
            model["enum"] = [world.served.name, "support", "absent"]
        config = schemathesis.Config.from_dict({"checks": REJECTED})
        self.schema = schemathesis.openapi.from_dict(document, config=config)
        self.schema.app = world.app
        self.headers = headers
        self.statuses: Counter[int] = Counter()

    def run(self, known: dict[str, Any]) -> None:
        """Send to every operation, with any path parameters and with ``known`` ones."""
        for result in self.schema.get_all_operations():
            operation: Any = result
            operation = operation.ok()
            names = {parameter.name for parameter in operation.path_parameters}
            existing = {name: value for name, value in known.items() if name in names}
            for mode in self.modes:
                for path_parameters in [None, existing] if existing else [None]:
                    self.send_some(operation, mode, path_parameters, self.headers)
            wrong_key = {"x-api-key": "wrong"}
            self.send_some(operation, self.modes[0], existing or None, wrong_key, examples=1)

    def send_some(
        self,
        operation: Any,
        mode: Any,
        path_parameters: dict[str, Any] | None,
        headers: dict[str, str],
        *,
        examples: int = EXAMPLES,
    ) -> None:
        """Send up to ``examples`` requests to one operation."""
        cases = operation.as_strategy(generation_mode=mode, path_parameters=path_parameters)

        @settings(BOUNDED, max_examples=examples)
        @given(case=cases)
        def send(case: Any) -> None:
            response = case.call(headers=headers)
            self.statuses[response.status_code] += 1
            case.validate_response(response, checks=self.checks, headers=headers)

        try:
            send()
        except Unsatisfiable:  # no valid or no invalid request exists
            assert mode.is_negative


@pytest.mark.slow
def test_every_response_is_as_the_openapi_document_says(tmp_path: Path) -> None:
    from schemathesis.python.asgi import shutdown_lifespans

    with make_world(tmp_path) as world:
        headers = operator_of(world)
        known = known_resources(world, headers)
        fuzzer = Fuzzer(world, headers)
        try:
            fuzzer.run(known)
        finally:
            shutdown_lifespans()
    statuses = fuzzer.statuses
    assert {200, 201, 204, 400, 401, 404} <= set(statuses)
    assert sum(count for status, count in statuses.items() if status < 300) > 50, statuses
