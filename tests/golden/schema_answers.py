"""Answers of the demo model under drawn schemas: those that end validate.

``python -m tests.golden.schema_answers [--count 200]`` prints how many end within 256 tokens, in
float32 and compact JSON. It takes minutes; ``test_golden_schemas.py`` asks for some of them.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import jsonschema

from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.model.drawn_schemas import schemas

FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "uuid"))
MAX_TOKENS, AT_ONCE = 256, 16
ASK = (
    'Answer with one short JSON object, such as {"name":"Anna","age":31,"note":"a few words"}, '
    "that follows this JSON schema:"
)

Schema = dict[str, Any]


@contextmanager
def demo_server(data: Path) -> Iterator[httpx2.Client]:
    """A client of a server with the demo model in float32."""
    demo_model(default_cache_dir())
    admin(data, "tenant", "create", "structured")
    issued = admin(data, "key", "create", "--tenant", "structured")
    assert isinstance(issued, dict)
    float32 = mock.patch.dict(os.environ, PREFIXD_DTYPE="float32")
    with float32, ServerProcess(data_dir=data, port=0) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        headers = {"authorization": f"Bearer {issued['key']}"}
        limits = httpx2.Limits(max_connections=None)
        with httpx2.Client(base_url=url, headers=headers, timeout=540, limits=limits) as http:
            yield http


def answers(http: httpx2.Client, drawn: Sequence[Schema]) -> list[tuple[str, str]]:
    """The text under each schema, and why it ended."""

    def ask(schema: Schema) -> tuple[str, str]:
        answer = http.post(
            "/v1/chat/completions",
            json={
                "model": "SmolLM2-135M-Instruct",
                "messages": [{"role": "user", "content": f"{ASK}\n{json.dumps(schema)}"}],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "record", "schema": schema, "strict": True},
                },
                "max_tokens": MAX_TOKENS,
                "temperature": 0.7,
                "seed": 1,
            },
        )
        assert answer.status_code == 200, (schema, answer.text)
        [choice] = answer.json()["choices"]
        return choice["message"]["content"], choice["finish_reason"]

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, drawn))


def count_ended(drawn: Sequence[Schema], given: Sequence[tuple[str, str]]) -> int:
    """How many answers ended. Each of those validates and is compact, all others say ``length``."""
    assert {reason for _, reason in given} <= {"stop", "length"}
    ended = [
        (schema, text) for schema, (text, why) in zip(drawn, given, strict=True) if why == "stop"
    ]
    for schema, text in ended:
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        kind(schema, format_checker=FORMATS).validate(json.loads(text))
        assert not re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)), text
    return len(ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    drawn = schemas(options.count, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder, demo_server(Path(folder)) as http:
        given = answers(http, drawn)
    ended = count_ended(drawn, given)
    print(f"{ended} of {len(drawn)} ended within {MAX_TOKENS} tokens and validate")
    for index, (text, why) in enumerate(given):
        if why != "stop":
            print(f"{index}: {text[:60]} ... {text[-40:]}")


if __name__ == "__main__":
    main()
