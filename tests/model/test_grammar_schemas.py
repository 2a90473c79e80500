"""Schemas of the documented subset: complete outputs of random tokens validate."""

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from prefixd.server.engine.constraint import Constraint, Grammar, GrammarKind, is_allowed
from prefixd.server.model.grammar.compiler import LLGuidanceCompiler
from prefixd.server.model.grammar.source import Vocabulary
from prefixd.server.model.grammar.subset import KEYWORDS
from prefixd.server.testing import EOS, VOCAB_SIZE, byte_tokenizer_json
from tests.model.drawn_schemas import keywords, schemas

NUM_SCHEMAS, MAX_BYTES = 200, 600
FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "uuid"))
"""Formats that are checked; a time may have a second 60 here, and not in the checker's."""

CLOSING = frozenset(b'"]},:')
READABLE = frozenset(b"abcdefghij 0123456789")


@pytest.fixture(scope="module")
def compiler() -> Iterator[LLGuidanceCompiler]:
    compiler = LLGuidanceCompiler(
        lambda: Vocabulary(byte_tokenizer_json(), VOCAB_SIZE, VOCAB_SIZE, (EOS,))
    )
    yield compiler
    compiler.close()


def test_drawn_schemas_use_the_whole_subset() -> None:
    assert KEYWORDS - keywords(schemas(NUM_SCHEMAS, seed=1)) == set()


@pytest.mark.slow
def test_complete_outputs_of_drawn_schemas_validate(compiler: LLGuidanceCompiler) -> None:
    complete = 0
    for index, schema in enumerate(schemas(NUM_SCHEMAS, seed=1)):
        constraint = compiler.compile(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
        text = walk(constraint, random.Random(index))
        if text is not None:
            complete += 1
            validate(json.loads(text), schema)
    assert complete >= 0.85 * NUM_SCHEMAS


def walk(constraint: Constraint, rng: random.Random) -> bytes | None:
    """An output of random tokens that ends where it may; None: it became too long."""
    progress, output = constraint.start((EOS,)), bytearray()
    while len(output) < MAX_BYTES:
        mask = progress.allowed(())
        assert mask is not None
        if is_allowed(mask, EOS):
            return bytes(output)
        allowed = [token for token in range(EOS) if is_allowed(mask, token)]
        closing = [token for token in allowed if token in CLOSING]
        readable = [token for token in allowed if token in READABLE]
        token = rng.choice((rng.random() < 0.3 and closing) or readable or closing or allowed)
        output.append(token)
        progress.advance([token])
    return None


def validate(value: Any, schema: dict[str, Any]) -> None:
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator.check_schema(schema)
    validator(schema, format_checker=FORMATS).validate(value)
