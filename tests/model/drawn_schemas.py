"""Schemas drawn from the documented subset of JSON Schema."""

import random
from typing import Any

NAMES = ("name", "age", "city", "tags", "price", "owner", "status", "note", "items", "active")
WORDS = ("red", "green", "blue", "small", "large", "open", "closed", "new")
PATTERNS = (
    "^[A-Z]{3}-[0-9]{2}$",
    "^[a-z]{1,8}@[a-z]{1,8}\\.com$",
    "^(yes|no|maybe)$",
    "^#[0-9a-f]{6}$",
)
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")
DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def schemas(count: int, *, seed: int) -> list[dict[str, Any]]:
    """``count`` schemas of objects."""
    return [_root(random.Random(f"{seed}:{index}"), index) for index in range(count)]


def keywords(schema: Any) -> set[str]:
    """The keywords of a schema, and of those in it."""
    if isinstance(schema, list):
        return set().union(*map(keywords, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    found = set(schema)
    for name, value in schema.items():
        if name in {"properties", "patternProperties", "$defs", "definitions"}:
            found |= set().union(*map(keywords, value.values())) if value else set()
        elif name not in {"enum", "const", "required", "default", "examples"}:
            found |= keywords(value)
    return found


def _root(rng: random.Random, index: int) -> dict[str, Any]:
    schema = _object(rng, 2)
    if index % 10 == 0 and "prefixItems" not in keywords(schema):  # which draft 7 does not know
        pair = {"type": "array", "items": [_leaf(rng), _leaf(rng)], "additionalItems": False}
        pair |= {"minItems": 2}
        schema = {**schema, "$schema": DRAFT_7, "definitions": {"pair": pair}}
        schema["properties"]["pair"] = {"$ref": "#/definitions/pair"}
        schema["required"].append("pair")
    elif index % 100 == 1:
        node = {
            "type": "object",
            "properties": {
                "value": _leaf(rng),
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
        schema = {**schema, "$defs": {"node": node}}
        schema["properties"]["list"] = {"$ref": "#/$defs/node"}
        schema["required"].append("list")
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    properties = {name: _value(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.8]
    return {
        "title": "A record",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or rng.random() < 0.5:
        return _leaf(rng)
    return rng.choice((_object, _array, _tuple, _map, _union, _both))(rng, depth)


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    items = _value(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}


def _tuple(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    return {"type": "array", "prefixItems": [_leaf(rng), _leaf(rng)], "items": False, "minItems": 1}


def _map(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    if rng.random() < 0.5:
        names = {"^[a-z]{1,5}$": _leaf(rng)}
        return {"type": "object", "patternProperties": names, "additionalProperties": False} | {
            "minProperties": 1,
            "maxProperties": 2,
        }
    return {"type": "object", "additionalProperties": _leaf(rng), "maxProperties": 2}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.5:
        return {"anyOf": [_leaf(rng), _object(rng, depth - 1)]}

    def variant(kind: str) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {"kind": {"const": kind}, "value": _leaf(rng)},
            "required": ["kind", "value"],
            "additionalProperties": False,
        }

    return {"oneOf": [variant(kind) for kind in rng.sample(WORDS, 2)]}


def _both(rng: random.Random, depth: int) -> dict[str, Any]:
    del depth
    lowest = rng.randint(0, 50)
    return {"allOf": [{"type": "integer", "minimum": lowest}, {"maximum": lowest + 100}]}


def _leaf(rng: random.Random) -> dict[str, Any]:
    lowest = rng.randint(-5, 20)
    return rng.choice(
        (
            {"type": "string", "minLength": rng.randint(0, 4), "maxLength": rng.randint(8, 40)},
            {"type": "string", "description": "A few words."},
            {"type": "string", "pattern": rng.choice(PATTERNS)},
            {"type": "string", "format": rng.choice(FORMATS)},
            {"type": "integer", "minimum": lowest, "maximum": lowest + rng.randint(1, 500)},
            {"type": "integer", "multipleOf": rng.choice((2, 5, 10)), "exclusiveMinimum": 0}
            | {"exclusiveMaximum": 1000},
            {"type": "number", "minimum": 0.5, "exclusiveMaximum": 99.5},
            {"type": ["boolean", "null"]},
            {"type": "boolean"},
            {"enum": rng.sample(WORDS, 3)},
            {"enum": [1, "two", None]},
            {"const": rng.choice(WORDS)},
        )
    )
