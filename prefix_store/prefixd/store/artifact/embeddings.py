"""Embeddings of a request: one tensor in safetensors, checked as strictly as a soft prompt."""

import io

import numpy as np

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.strict import read_single, shown
from prefixd.store.artifact.weights import (
    CHUNK_ELEMENTS,
    Floats,
    ValueRule,
    check_range,
    read_values,
)
from prefixd.store.errors import ArtifactRefused

NAME = "prompt_embeds"
"""The name of the tensor in messages; in the file it may have any."""

_ADVICE = (
    'write the tensor with safetensors.torch.save({"prompt_embeds": tensor}) and send its bytes in '
    "base64"
)


def read_embeddings(raw: bytes, base: BaseSpec, *, max_rows: int) -> Floats:
    """The rows [tokens, embedding_width], float32, of the one tensor of ``raw``, of which a shape
    [1, tokens, width] is taken too. Raises ArtifactRefused."""
    if Kind.SOFT_PROMPT in base.refused_kinds:
        raise ArtifactRefused(
            "unsupported_kind",
            f"the base {base.name} takes no embeddings in place of tokens: expected a prompt",
            param=NAME,
        )
    file = io.BytesIO(raw)
    entry = read_single(file, size=len(raw), name=NAME, advice=_ADVICE)
    shape = entry.shape[1:] if len(entry.shape) == 3 and entry.shape[0] == 1 else entry.shape
    width = base.embedding_width
    if len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= max_rows:
        written = ", ".join(shown(extent) for extent in entry.shape)
        raise ArtifactRefused(
            "wrong_shape",
            f"expected a tensor [tokens, {width}] (embedding width of the base {base.name}) of 1 "
            f"to {max_rows} tokens, got [{written}]",
            param=NAME,
        )
    rows = np.empty((shape[0], width), dtype=np.float32)
    rule, step = ValueRule(base.dtype, base.max_abs_embedding), max(1, CHUNK_ELEMENTS // width)
    for first in range(0, shape[0], step):
        count = min(step, shape[0] - first)
        values = read_values(file, 0, entry, first=first * width, count=count * width)
        rows[first : first + count] = values.reshape(count, width)
        check_range(rows[first : first + count], rule, first_row=first, name=NAME)
    return rows
