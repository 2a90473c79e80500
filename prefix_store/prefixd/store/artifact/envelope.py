"""Artifact files: a first line that says what they hold, and the payload.

An artifact file is one self-contained byte string, whose sha256 is the prefix's digest::

    {"config":{...},"format":1,"kind":"soft_prompt",...,"payload_bytes":N}\\n      canonical JSON
    N bytes: adapter_model.safetensors as uploaded, the UTF-8 text, or the members of a composition

So ``sha256sum`` on a blob checks it. The digest covers the config and the task id too: the same
tensor under another type is another prefix. A text that is a system turn has ``"role":"system"`` in
its first line; any other has no role there.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from prefixd.store.artifact.kinds import KINDS, Kind, TextRole
from prefixd.store.artifact.strict import (
    MAX_DEPTH,
    StrictJsonError,
    canonical,
    parse_object,
    shown,
)
from prefixd.store.errors import ArtifactRefused

FORMAT = 1

MAX_LINE_BYTES = 2 * 1024 * 1024
"""Longest first line: a config of 256 KiB, spelt canonically. 1e15 grows most."""

_COPY_BYTES = 1024 * 1024
_COMPOSED = tuple(str(kind) for kind in Kind if kind.is_composed)
_FIELDS = {"config", "format", "kind", "payload_bytes", "peft_type", "task_id"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A written artifact file: its sha256 in hexadecimal, and its size in bytes."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Envelope:
    """The first line of an artifact file, and where its payload begins."""

    kind: Kind
    peft_type: str | None
    task_id: int | None
    config: dict[str, Any] | None
    payload_offset: int
    payload_bytes: int
    role: TextRole | None = None


def read_envelope(path: Path) -> Envelope:
    """Read and check the first line of an artifact file; raise ArtifactRefused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        line = file.readline(MAX_LINE_BYTES + 1)
    if line[8:9] == b"{" and line[:1] != b"{":
        raise _malformed(
            "it looks like safetensors, which is uploaded as multipart/form-data, with its config"
        )
    if not line.endswith(b"\n"):
        raise _malformed("its first line does not end")
    try:
        fields = parse_object(line[:-1], max_depth=MAX_DEPTH + 1)
    except StrictJsonError as error:
        raise _malformed(str(error)) from None
    if set(fields) - {"role"} != _FIELDS or canonical(fields) != line[:-1]:
        raise _malformed("its first line is not the canonical one")
    _check_envelope(fields, payload_bytes=size - len(line))
    return Envelope(
        kind=Kind(fields["kind"]),
        peft_type=fields["peft_type"],
        task_id=fields["task_id"],
        config=fields["config"],
        payload_offset=len(line),
        payload_bytes=size - len(line),
        role=TextRole(fields.get("role", TextRole.RAW))
        if fields["kind"] == Kind.HARD_PROMPT
        else None,
    )


def write_artifact(
    kind: Kind, fields: dict[str, Any], source: BinaryIO, size: int, target: Path
) -> Packed:
    """Write the first line and the ``size`` bytes of ``source``, and fsync them. Raise
    ArtifactRefused when the source has another size."""
    head = fields | {"format": FORMAT, "kind": str(kind), "payload_bytes": size}
    line = canonical(head) + b"\n"
    digest = hashlib.sha256(line)
    written = 0
    with target.open("wb") as file:
        file.write(line)
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
    return Packed(digest.hexdigest(), len(line) + written)


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
    if config is None and task_id is not None:
        raise _malformed("a text has no task id")
    is_composed = config is None and fields["kind"] in _COMPOSED
    if is_composed:
        kind = fields["kind"]
    is_text = config is None and not is_composed
    if "role" in fields and (not is_text or fields["role"] != TextRole.SYSTEM):
        raise _malformed("only a text has a role here, and only 'system'")
    if config is not None:
        peft_type = config.get("peft_type") if isinstance(config, dict) else None
        if not isinstance(peft_type, str) or peft_type not in KINDS:
            raise _malformed("its config is not a prefix's")
        kind = str(KINDS[peft_type])
    if (fields["kind"], fields["peft_type"]) != (kind, peft_type):
        raise _malformed("its kind and PEFT type do not match its config")


def _malformed(message: str) -> ArtifactRefused:
    return ArtifactRefused("malformed_artifact", f"not an artifact file: {message}")
