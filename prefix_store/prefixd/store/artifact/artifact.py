"""Artifacts: a prefix's bytes, parsed and checked against a base. No torch, no SQL."""

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from prefixd.store.artifact.adaption import AdaptionWeights, open_adaption
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.composition import (
    MAX_COMPOSITION_BYTES,
    Combine,
    Member,
    composition_payload,
    parse_payload,
)
from prefixd.store.artifact.config import PeftConfig, from_fields, parse_config
from prefixd.store.artifact.envelope import Envelope, Packed, read_envelope, write_artifact
from prefixd.store.artifact.kinds import Kind, TextRole
from prefixd.store.artifact.weights import Floats, PeftWeights, open_weights
from prefixd.store.errors import ArtifactRefused
from prefixd.store.files import copy_durably, sha256_of

CountTokens = Callable[..., int]
"""The virtual tokens of a text, and of one with another role than ``raw`` with ``role=``."""

MAX_TEXT_BYTES = 1024 * 1024
"""Checked before tokens are counted: no tokenizer runs over an unlimited text."""


@dataclass(frozen=True, slots=True)
class Summary:
    """An artifact that was checked against a base, without its values. ``dtype`` is the file's;
    ``role`` is that of a text, else None. ``members`` are those of a composition."""

    kind: Kind
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    task_id: int | None
    base_model_name_or_path: str | None
    role: TextRole | None = field(default=None, kw_only=True)
    members: tuple[Member, ...] = field(default=(), kw_only=True)
    combine: Combine | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Artifact(Summary):
    """An artifact that was checked against a base, ready to compile.

    ``values`` is float32 as in the file (not yet rounded to the serving dtype): [P, width] for a
    soft prompt, MULTITASK folded for its task, or [P, layers * 2 * kv_heads * head_dim] for a KV
    prefix; None for text. Of an adaption prompt they are [adapted layers * P, width], and ``gates``
    [adapted layers].
    """

    values: Floats | None
    text: str | None
    gates: Floats | None = None


def inspect_peft(
    config: bytes, weights: Path, *, base: BaseSpec, task_id: int | None = None
) -> Summary:
    """Check a whole upload, values too, in bounded memory; raise ArtifactRefused."""
    parsed = parse_config(config)
    with weights.open("rb") as file:
        size = weights.stat().st_size
        opened = _open(file, start=0, size=size, config=parsed, base=base, task_id=task_id)
        for _ in opened.rows():
            pass
    return _summary(parsed, opened)


def inspect_text(
    text: str, *, base: BaseSpec, count_tokens: CountTokens, role: TextRole = TextRole.RAW
) -> Summary:
    """Check a hard prompt; raise ArtifactRefused. ``count_tokens`` is the base's tokenizer."""
    base.require_kind(Kind.HARD_PROMPT)
    _encode_text(text)
    count = count_tokens(text) if role is TextRole.RAW else count_tokens(text, role=role)
    if count < 1 and role is TextRole.RAW:
        raise ArtifactRefused("empty_text", "expected a text of at least one token", param="text")
    if count > base.max_virtual_tokens:
        raise ArtifactRefused(
            "too_many_virtual_tokens",
            f"expected at most {base.max_virtual_tokens} virtual tokens, and this text has {count}",
            param="text",
        )
    return Summary(Kind.HARD_PROMPT, None, count, None, None, None, role=role)


def inspect_artifact(path: Path, *, base: BaseSpec, count_tokens: CountTokens) -> Summary:
    """Check an artifact file as strictly as the upload that made it, values too, in bounded memory;
    raise ArtifactRefused."""
    envelope = read_envelope(path)
    with path.open("rb") as file:
        if envelope.config is None:
            text = _read_text(file, envelope)
            return _inspect(text, envelope, base, count_tokens)
        config = from_fields(envelope.config)
        opened = _open_payload(file, envelope, config, base)
        for _ in opened.rows():
            pass
        return _summary(config, opened)


def read_artifact(path: Path, *, base: BaseSpec, count_tokens: CountTokens) -> Artifact:
    """Read an artifact file and check it against ``base`` as strictly as an upload.

    The base, its dtype or its bounds may have changed since the upload. Raises ArtifactRefused.
    """
    envelope = read_envelope(path)
    with path.open("rb") as file:
        if envelope.config is None:
            text = _read_text(file, envelope)
            summary = _inspect(text, envelope, base, count_tokens)
            return Artifact(**asdict(summary), values=None, text=text)
        config = from_fields(envelope.config)
        opened = _open_payload(file, envelope, config, base)
        gates = opened.gates() if isinstance(opened, AdaptionWeights) else None
        return Artifact(
            **asdict(_summary(config, opened)), values=opened.load(), text=None, gates=gates
        )


def pack_peft(config: bytes, weights: Path, target: Path, *, task_id: int | None = None) -> Packed:
    """Write an artifact file from a config and a spooled weights file, streaming, and fsync it.

    Checks the config only: call ``inspect_peft`` first. The config is stored canonically, so that
    whitespace in it makes no new version.
    """
    parsed = parse_config(config)
    size = weights.stat().st_size
    with weights.open("rb") as source:
        fields = {"config": parsed.fields, "peft_type": parsed.peft_type, "task_id": task_id}
        return write_artifact(parsed.kind, fields, source, size, target)


def pack_text(text: str, target: Path, *, role: TextRole = TextRole.RAW) -> Packed:
    """Write the artifact file of a hard prompt, and fsync it; raise ArtifactRefused."""
    payload = _encode_text(text)
    fields: dict[str, Any] = {"config": None, "peft_type": None, "task_id": None}
    if role is not TextRole.RAW:  # texts had no role at first: their digests stay
        fields["role"] = str(role)
    return write_artifact(Kind.HARD_PROMPT, fields, io.BytesIO(payload), len(payload), target)


def pack_composition(
    kind: Kind, members: Sequence[Member], combine: Combine | None, target: Path
) -> Packed:
    """Write the artifact file of a stack, a blend or an ensemble, and fsync it."""
    payload = composition_payload(members, combine)
    fields: dict[str, Any] = {"config": None, "peft_type": None, "task_id": None}
    return write_artifact(kind, fields, io.BytesIO(payload), len(payload), target)


def read_composition(path: Path) -> tuple[Kind, tuple[Member, ...], Combine | None] | None:
    """Kind, members and how they are combined, of an artifact file of a composition; None for that
    of another kind. Raises ArtifactRefused."""
    envelope = read_envelope(path)
    if not envelope.kind.is_composed:
        return None
    with path.open("rb") as file:
        file.seek(envelope.payload_offset)
        payload = file.read(MAX_COMPOSITION_BYTES + 1)
    members, combine = parse_payload(envelope.kind, payload)
    return envelope.kind, members, combine


def pack_artifact(source: Path, target: Path) -> Packed:
    """Copy an artifact file that ``inspect_artifact`` accepted, and fsync it. There is one spelling
    of a first line, so the digest is that of any other upload of the same content."""
    copy_durably(source, target)
    return Packed(sha256_of(target), target.stat().st_size)


def _read_text(file: BinaryIO, envelope: Envelope) -> str:
    file.seek(envelope.payload_offset)
    return _decode_text(file.read(MAX_TEXT_BYTES + 1))


def read_text(path: Path) -> str:
    """The text of the artifact file of a hard prompt; raise ArtifactRefused."""
    with path.open("rb") as file:
        return _read_text(file, read_envelope(path))


def _inspect(text: str, envelope: Envelope, base: BaseSpec, count_tokens: CountTokens) -> Summary:
    role = envelope.role or TextRole.RAW
    return inspect_text(text, base=base, count_tokens=count_tokens, role=role)


def _open_payload(
    file: BinaryIO, envelope: Envelope, config: PeftConfig, base: BaseSpec
) -> PeftWeights | AdaptionWeights:
    return _open(
        file,
        start=envelope.payload_offset,
        size=envelope.payload_bytes,
        config=config,
        base=base,
        task_id=envelope.task_id,
    )


def _open(
    file: BinaryIO,
    *,
    start: int,
    size: int,
    config: PeftConfig,
    base: BaseSpec,
    task_id: int | None,
) -> PeftWeights | AdaptionWeights:
    """Check the header of safetensors bytes against config and base; raise ArtifactRefused."""
    opener = open_adaption if config.kind is Kind.ADAPTION_PROMPT else open_weights
    return opener(file, start=start, size=size, config=config, base=base, task_id=task_id)


def _summary(config: PeftConfig, weights: PeftWeights | AdaptionWeights) -> Summary:
    return Summary(
        kind=config.kind,
        peft_type=config.peft_type,
        num_virtual_tokens=config.num_virtual_tokens,
        dtype=weights.dtype,
        task_id=weights.task_id,
        base_model_name_or_path=config.base_model_name_or_path,
    )


def _encode_text(text: str) -> bytes:
    """A hard prompt as UTF-8; raise ArtifactRefused when it is too large or cannot be."""
    try:
        payload = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArtifactRefused(
            "malformed_text",
            f"expected text that UTF-8 can hold, got an unpaired surrogate at {error.start}",
            param="text",
        ) from None
    _check_text_size(len(payload))
    return payload


def _decode_text(payload: bytes) -> str:
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
