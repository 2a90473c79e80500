"""Artifacts: a prefix's bytes, parsed and judged against a base. No torch, no SQL."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefixd.store.artifact.base import BaseSpec
from prefixd.store.artifact.envelope import (
    MAX_TEXT_BYTES,
    Envelope,
    Packed,
    decode_text,
    encode_text,
    pack_peft,
    pack_text,
    read_envelope,
)
from prefixd.store.artifact.peft_config import Kind, PeftConfig, from_fields, parse_config
from prefixd.store.artifact.values import Floats
from prefixd.store.artifact.weights import PeftWeights, open_weights
from prefixd.store.errors import ArtifactRefused

__all__ = [
    "Artifact",
    "Envelope",
    "Kind",
    "Packed",
    "Summary",
    "inspect_peft",
    "inspect_text",
    "pack_peft",
    "pack_text",
    "read_artifact",
    "read_envelope",
]


@dataclass(frozen=True, slots=True)
class Summary:
    """What is known of an artifact judged against a base, without its values."""

    kind: Kind
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    task_id: int | None
    base_model_name_or_path: str | None


@dataclass(frozen=True, slots=True)
class Artifact:
    """An artifact judged against a base, ready to compile.

    ``values`` is float32 as in the file (not yet rounded to the serving dtype): [P, hidden] for a
    soft prompt, MULTITASK folded for its task, or [P, layers * 2 * kv_heads * head_dim] for a KV
    prefix; None for text. ``dtype`` is the file's.
    """

    kind: Kind
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    values: Floats | None
    text: str | None
    task_id: int | None
    base_model_name_or_path: str | None


def inspect_peft(
    config: bytes, weights: Path, *, base: BaseSpec, task_id: int | None = None
) -> Summary:
    """Judge an upload completely, values too, in bounded memory; raise ArtifactRefused."""
    parsed = parse_config(config)
    with weights.open("rb") as file:
        size = weights.stat().st_size
        opened = open_weights(file, start=0, size=size, config=parsed, base=base, task_id=task_id)
        for _ in opened.rows():
            pass
    return _summary(parsed, opened)


def inspect_text(text: str, *, base: BaseSpec, count_tokens: Callable[[str], int]) -> Summary:
    """Judge a hard prompt; raise ArtifactRefused. ``count_tokens`` is the base's tokenizer."""
    encode_text(text)
    count = count_tokens(text)
    if count < 1:
        raise ArtifactRefused("empty_text", "expected a text of at least one token", param="text")
    if count > base.max_virtual_tokens:
        raise ArtifactRefused(
            "too_many_virtual_tokens",
            f"expected at most {base.max_virtual_tokens} virtual tokens, and this text has {count}",
            param="text",
        )
    return Summary(Kind.HARD_PROMPT, None, count, None, None, None)


def read_artifact(path: Path, *, base: BaseSpec, count_tokens: Callable[[str], int]) -> Artifact:
    """Read an artifact file and judge it against ``base`` as strictly as an upload.

    Judged again, and not only at upload: the base, its dtype or its bounds may have changed since.
    Raises ArtifactRefused.
    """
    envelope = read_envelope(path)
    if envelope.config is None:
        with path.open("rb") as file:
            file.seek(envelope.payload_offset)
            text = decode_text(file.read(MAX_TEXT_BYTES + 1))
        summary = inspect_text(text, base=base, count_tokens=count_tokens)
        return _artifact(summary, values=None, text=text)
    config = from_fields(envelope.config)
    with path.open("rb") as file:
        opened = open_weights(
            file,
            start=envelope.payload_offset,
            size=envelope.payload_bytes,
            config=config,
            base=base,
            task_id=envelope.task_id,
        )
        return _artifact(_summary(config, opened), values=opened.load(), text=None)


def _summary(config: PeftConfig, weights: PeftWeights) -> Summary:
    return Summary(
        kind=config.kind,
        peft_type=config.peft_type,
        num_virtual_tokens=config.num_virtual_tokens,
        dtype=weights.dtype,
        task_id=weights.task_id,
        base_model_name_or_path=config.base_model_name_or_path,
    )


def _artifact(summary: Summary, *, values: Floats | None, text: str | None) -> Artifact:
    return Artifact(
        kind=summary.kind,
        peft_type=summary.peft_type,
        num_virtual_tokens=summary.num_virtual_tokens,
        dtype=summary.dtype,
        values=values,
        text=text,
        task_id=summary.task_id,
        base_model_name_or_path=summary.base_model_name_or_path,
    )
