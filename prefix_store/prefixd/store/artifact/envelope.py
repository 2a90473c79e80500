"""The artifact file: one self-contained byte string, whose sha256 is the prefix's digest.

::

    {"config":{...},"format":1,"kind":"soft_prompt",...,"payload_bytes":N}\\n      canonical JSON
    N bytes: adapter_model.safetensors as uploaded, or the UTF-8 text              verbatim

So ``sha256sum`` on a blob checks it. The digest covers the config and the task id too: the same
tensor under another type is another prefix.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prefixd.store.artifact.peft_config import KINDS, Kind, parse_config
from prefixd.store.artifact.strict_json import (
    MAX_DEPTH,
    StrictJsonError,
    canonical,
    parse_object,
    shown,
)
from prefixd.store.errors import ArtifactRefused

FORMAT = 1
MAX_TEXT_BYTES = 1024 * 1024
"""Tokens are counted only after this cap: no tokenizer runs over an endless text."""

_MAX_LINE_BYTES = 2 * 1024 * 1024  # a config of 256 KiB, spelt canonically: 1e15 grows most
_COPY_BYTES = 1024 * 1024
_FIELDS = {"config", "format", "kind", "payload_bytes", "peft_type", "task_id"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A written artifact file: its sha256 in hexadecimal, and its size in bytes."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Envelope:
    """The first line of an artifact file, and where its payload lies."""

    kind: Kind
    peft_type: str | None
    task_id: int | None
    config: dict[str, Any] | None
    payload_offset: int
    payload_bytes: int


def pack_peft(config: bytes, weights: Path, target: Path, *, task_id: int | None = None) -> Packed:
    """Write an artifact file from a config and a spooled weights file, streaming, and fsync it.

    Judges the config only: ``inspect_peft`` first. The config is kept canonical, so that white
    space in it makes no new version.
    """
    parsed = parse_config(config)
    size = weights.stat().st_size
    head = _head(parsed.kind, parsed.peft_type, task_id, parsed.fields, size)
    with weights.open("rb") as source:
        return _write(head, source, size, target)


def pack_text(text: str, target: Path) -> Packed:
    """Write the artifact file of a hard prompt, and fsync it; raise ArtifactRefused."""
    payload = encode_text(text)
    head = _head(Kind.HARD_PROMPT, None, None, None, len(payload))
    with target.open("wb") as file:
        file.write(head + payload)
        file.flush()
        os.fsync(file.fileno())
    return Packed(hashlib.sha256(head + payload).hexdigest(), len(head) + len(payload))


def read_envelope(path: Path) -> Envelope:
    """Read and judge the first line of an artifact file; raise ArtifactRefused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        line = file.readline(_MAX_LINE_BYTES + 1)
    if not line.endswith(b"\n"):
        raise _malformed("its first line does not end")
    try:
        fields = parse_object(line[:-1], max_depth=MAX_DEPTH + 1)
    except StrictJsonError as error:
        raise _malformed(str(error)) from None
    if set(fields) != _FIELDS or canonical(fields) != line[:-1]:
        raise _malformed("its first line is not the canonical one")
    _check_envelope(fields, payload_bytes=size - len(line))
    return Envelope(
        kind=Kind(fields["kind"]),
        peft_type=fields["peft_type"],
        task_id=fields["task_id"],
        config=fields["config"],
        payload_offset=len(line),
        payload_bytes=size - len(line),
    )


def _head(
    kind: Kind,
    peft_type: str | None,
    task_id: int | None,
    config: dict[str, Any] | None,
    payload_bytes: int,
) -> bytes:
    fields = {
        "config": config,
        "format": FORMAT,
        "kind": str(kind),
        "payload_bytes": payload_bytes,
        "peft_type": peft_type,
        "task_id": task_id,
    }
    return canonical(fields) + b"\n"


def _write(head: bytes, source: BinaryIO, size: int, target: Path) -> Packed:
    digest = hashlib.sha256(head)
    written = 0
    with target.open("wb") as file:
        file.write(head)
        while piece := source.read(_COPY_BYTES):
            digest.update(piece)
            file.write(piece)
            written += len(piece)
        file.flush()
        os.fsync(file.fileno())
    if written != size:
        raise ArtifactRefused(
            "truncated", f"expected {size} bytes of weights, got {written}", param="weights"
        )
    return Packed(digest.hexdigest(), len(head) + written)


def _check_envelope(fields: dict[str, Any], *, payload_bytes: int) -> None:
    if type(fields["format"]) is not int or fields["format"] != FORMAT:
        raise _malformed(f"expected format {FORMAT}, got {shown(fields['format'])}")
    if fields["payload_bytes"] != payload_bytes or type(fields["payload_bytes"]) is not int:
        raise _malformed(
            f"expected {shown(fields['payload_bytes'])} bytes of payload, got {payload_bytes}"
        )
    task_id, config = fields["task_id"], fields["config"]
    if task_id is not None and type(task_id) is not int:
        raise _malformed(f"expected a whole number or null as task id, got {shown(task_id)}")
    kind, peft_type = str(Kind.HARD_PROMPT), None
    if config is not None:
        peft_type = config.get("peft_type") if isinstance(config, dict) else None
        if not isinstance(peft_type, str) or peft_type not in KINDS:
            raise _malformed("its config is not one of a prefix")
        kind = str(KINDS[peft_type])
    if (fields["kind"], fields["peft_type"]) != (kind, peft_type):
        raise _malformed("its kind and PEFT type do not match its config")


def encode_text(text: str) -> bytes:
    """A hard prompt as UTF-8; raise ArtifactRefused when it is too large or cannot be."""
    try:
        payload = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArtifactRefused(
            "malformed_text",
            f"expected text that UTF-8 can hold, got a lone surrogate at {error.start}",
            param="text",
        ) from None
    _check_text_size(len(payload))
    return payload


def decode_text(payload: bytes) -> str:
    """UTF-8 as a hard prompt; raise ArtifactRefused."""
    _check_text_size(len(payload))
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactRefused(
            "malformed_text", f"the text is not UTF-8 at byte {error.start}", param="text"
        ) from None


def _check_text_size(size: int) -> None:
    if size > MAX_TEXT_BYTES:
        raise ArtifactRefused(
            "text_too_large", f"expected at most {MAX_TEXT_BYTES} bytes, got {size}", param="text"
        )


def _malformed(message: str) -> ArtifactRefused:
    return ArtifactRefused("malformed_artifact", f"not an artifact file: {message}")
