"""Random JSON values, texts and uploads, valid and invalid, each determined by its generator."""

import json
import random
import struct
from collections.abc import Mapping
from typing import Any

from tests.faults.faults_model import VOCAB, Content

NAMES = ("alpha", "beta", "gamma", "delta", "padded")
ALIASES = ("latest", "prod", "next")
USERS = ("ann", "bob", "Zoë/1", "\u202euser")

TEXTS = (
    "",
    " ",
    "w5 w6 w7",
    f"w5 w{VOCAB} w{VOCAB + 3}",
    "w1 w2 w0",
    "\x00",
    "a\x00b",
    "\r\n\t\x0b\x7f\x85",
    "\ufeff\u200b\u202e\u2028",
    "e\u0301\u1100\u1161\u11a8",
    "😀👩‍👩‍👧‍👦🏳️‍🌈",
    "שלום عربى 中文 ไทย",
    "../../etc/passwd",
    "%00%2e%2e%2f",
    "alpha@1",
    "@",
    "alpha@@1",
    "'; DROP TABLE prefixes; --",
    "{{ 7 * 7 }}{% for x in y %}",
    "w5 " * 4000,
    "\U0010ffff" * 300,
    "x" * 70_000,
)
NUMBERS = (
    *(0, 1, -1, 2, 7, 16, 63, 128, 211, 212, 500, 2047, 2048, 2049, -7),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**30),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e-7, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
)
RAW_BODIES = (
    b"",
    b"null",
    b"[]",
    b'"text"',
    b"{",
    b'{"model": "tiny", "prompt": "w5"',
    b'{"model": "tiny", "model": "tiny", "prompt": [5], "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "\\ud83d\\ude00 \\u0000", "max_tokens": 1}',
    b'{"model": "tiny", "prompt": "\xff\xfe", "max_tokens": 1}',
    b'\xef\xbb\xbf{"model": "tiny", "prompt": [5], "max_tokens": 1}',
    b'{"model": "tiny", "prompt": [5], "max_tokens": 1e999}',
    b'{"model": "tiny", "prompt": [5], "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny", "prompt": [' + b"5," * 30_000 + b"5]}",
    b"[" * 100_000,
    b'{"a":' * 20_000,
    bytes(range(256)) * 8,
)
RAW_REQUESTS = (
    b"GET\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /v1/models HTTP/9.9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/users HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nhello",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /health/ready HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 3000 + b"\r\n",
    b"GET /%zz/../%c0%ae HTTP/1.1\r\nHost: x\r\n\r\n",
)


def any_text(rng: random.Random) -> str:
    """A text from the list, or random characters of all planes except surrogates."""
    if rng.random() < 0.7:
        return rng.choice(TEXTS)
    points = [rng.randrange(0x110000) for _ in range(rng.randrange(40))]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def any_value(rng: random.Random, *, depth: int = 0) -> Any:
    """Any JSON value, NaN and infinity included."""
    kind = rng.randrange(4 if depth > 2 else 7)
    match kind:
        case 0:
            return rng.choice((None, True, False))
        case 1 | 2:
            return rng.choice(NUMBERS)
        case 3:
            return any_text(rng)
        case 4:
            return [any_value(rng, depth=depth + 1) for _ in range(rng.randrange(4))]
        case 5:
            keys = [rng.choice((any_text(rng), "model", "type")) for _ in range(rng.randrange(3))]
            return {key: any_value(rng, depth=depth + 1) for key in keys}
        case _:
            nested: Any = 0
            for _ in range(rng.randrange(200)):
                nested = [nested]
            return nested


def any_reference(rng: random.Random) -> str:
    """A prefix reference that often exists."""
    kind = rng.random()
    if kind < 0.15:
        return any_text(rng)
    name = rng.choice(NAMES)
    if kind < 0.6:
        return name
    invalid = "0", "-1", "9" * 20, "", "x@y"
    return f"{name}@{rng.choice((*ALIASES, '1', '1', '2', '3', rng.choice(invalid)))}"


class SchemaValues:
    """Values for the JSON schemas of an OpenAPI document: mostly of the right type, at and beyond
    the bounds."""

    def __init__(self, document: Mapping[str, Any], rng: random.Random) -> None:
        self._components = document["components"]["schemas"]
        self._rng = rng

    def value(self, schema: Mapping[str, Any], *, depth: int = 0) -> Any:
        """A value for ``schema``; now and then any other."""
        rng, chosen = self._rng, schema
        while "$ref" in chosen or "anyOf" in chosen or "oneOf" in chosen:
            name = chosen.get("$ref", "").rpartition("/")[2]
            several = chosen.get("anyOf") or chosen.get("oneOf") or [{}]
            chosen = self._components[name] if name else rng.choice(several)
        if rng.random() < 0.05 or depth > 6:
            return any_value(rng)
        if "enum" in chosen or "const" in chosen:
            return rng.choice(chosen.get("enum") or [chosen["const"]])
        return self._typed(chosen, depth=depth)

    def _typed(self, schema: Mapping[str, Any], *, depth: int) -> Any:
        rng, value = self._rng, None
        match schema.get("type"):
            case "integer" | "number":
                value = self._number(schema)
            case "boolean":
                value = rng.random() < 0.5
            case "string":
                value = rng.choice((any_text(rng), any_reference(rng), "w5 w6", "2026-01-01"))
            case "array":
                item = schema.get("items", {})
                value = [self.value(item, depth=depth + 1) for _ in range(rng.randrange(4))]
            case "object" if "properties" in schema:
                value = self._object(schema, depth=depth)
            case "null":
                pass
            case _:
                value = any_value(rng)
        return value

    def _number(self, schema: Mapping[str, Any]) -> Any:
        rng = self._rng
        bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        edges = [
            schema[bound] + shift for bound in bounds if bound in schema for shift in (-1, 0, 1)
        ]
        return rng.choice((*edges, 1, 2, 3, rng.choice(NUMBERS)))

    def _object(self, schema: Mapping[str, Any], *, depth: int) -> dict[str, Any]:
        rng, required = self._rng, schema.get("required", ())
        chosen = {
            name: self.value(field, depth=depth + 1)
            for name, field in schema["properties"].items()
            if rng.random() < (0.95 if name in required else 0.25)
        }
        if rng.random() < 0.05:
            chosen[any_text(rng)] = any_value(rng)
        return chosen


def any_upload(rng: random.Random, contents: list[Content]) -> dict[str, Any]:
    """An upload as keyword arguments of a request, and its content type (None: httpx2's own):
    valid, or damaged in one place."""
    if rng.random() < 0.3:
        body = {"kind": "text", "text": any_text(rng)}
        if rng.random() < 0.3:
            body["metadata"] = any_value(rng)
        return {"content": json.dumps(body).encode(), "type": "application/json"}
    valid = rng.choice([content for content in contents if content.kind != "text"]).body()
    config, weights = (data for _, data in valid["files"].values())
    damage = rng.randrange(6)
    if damage == 1:
        fields = json.loads(config)
        fields[rng.choice((*fields, "modules_to_save", "extra"))] = any_value(rng)
        config = json.dumps(fields).encode()
    elif damage == 2:
        weights = _damaged(rng, weights)
    elif damage == 3:
        config, weights = (rng.choice((weights, rng.randbytes(200), b"")) for _ in range(2))
    parts: list[tuple[str, Any]] = [
        ("config", ("adapter_config.json", config)),
        ("weights", ("adapter_model.safetensors", weights)),
    ]
    if damage == 4:
        parts.append(("metadata", ("metadata", json.dumps(any_value(rng)).encode())))
    elif damage == 5:
        parts = rng.choice((parts[:1], parts + parts, [*parts, ("other", ("x", b"x"))], []))
    return {"files": parts or [("none", ("", b""))], "type": None}


def _damaged(rng: random.Random, weights: bytes) -> bytes:
    """A safetensors file that is cut, flipped, or has other numbers or another header."""
    data = bytearray(weights)
    (header,) = struct.unpack("<Q", data[:8])
    match rng.randrange(6):
        case 0:
            return bytes(data[: rng.randrange(len(data))])
        case 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, header + 1, 2**40, 2**64 - 1)))
        case 3:
            number = rng.choice((float("nan"), float("inf"), 3e38, -3e38, 1e20, 60.0, 1e-40))
            place = 8 + header + 4 * rng.randrange((len(data) - 8 - header) // 4)
            data[place : place + 4] = struct.pack("<f", number)
        case 4:
            scale = 10 ** rng.uniform(-4, 3)
            values = struct.unpack(f"<{(len(data) - 8 - header) // 4}f", data[8 + header :])
            data[8 + header :] = struct.pack(f"<{len(values)}f", *(v * scale for v in values))
        case _:
            data += rng.randbytes(rng.randrange(1, 64))
    return bytes(data)
