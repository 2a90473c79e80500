"""Run the model once before serving: attention over KV blocks must give the model's own logits.

The config does not show everything. The check compares the logits of several texts under the
model's own eager attention, each text alone and whole, with those of the same texts run as the
server runs them: compiled as a prefix, in chunks, token by token, and several in one pass. So a
model is rejected whose logits depend on later tokens, on the chunk or on the batch, or that needs
something else (a soft cap, state-space layers). All arithmetic is in float32, in any
serving dtype: the rounding of bfloat16 would hide differences below one percent (decision 0010).
"""

import dataclasses
import logging
from dataclasses import dataclass
from math import isfinite
from statistics import median

import torch

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.decoder_check import Evidence
from prefixd.server.model.float32 import float32_arithmetic
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.onsets import Onset, onsets_of
from prefixd.server.model.quantized import plain
from prefixd.server.model.selfcheck_compare import TOLERANCE, Comparison, Truth
from prefixd.server.model.selfcheck_texts import Text, long_text, short_texts
from prefixd.server.model.tensors import own_part

log = logging.getLogger(__name__)

HALF_TOLERANCE = 0.5
"""Largest difference of a logit at the median position, in the serving dtype. Correct ways of
running a model in bfloat16 differ by 0.1; a wrong position or a missing prefix differs by 1."""

_MAX_LENGTH = 4096
"""Longest text that is checked."""

_PAST = 16
"""Fewest positions that a text has past an onset."""

_LARGE, _LARGE_CHUNK = 50_000_000, 64
"""A model of more parameters than the first runs no chunk longer than the second on a CPU: one of
256 tokens would add a fifth to the demo model's start."""

_TEXTS_TRIED = 3
"""A text whose routing to experts is a near tie says nothing; another one is tried."""

MARGIN = 1024.0
"""An uploaded value may be this many times larger than the largest one of the base."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of |x| for uploaded values: of a soft prompt's entries, of a KV prefix's."""

    max_abs_embedding: float
    max_abs_kv: float


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check of a model found: bounds, and what its decoder is checked with."""

    limits: Limits
    evidence: Evidence


@torch.no_grad()
def self_check(base: LoadedBase, *, block_size: int, prefill_chunk: int = 256) -> Checked:
    """Check that the model can be served, and derive the bounds of uploaded values from it.

    Uses small pools of its own, since the server's may have fewer blocks. Logs which features of
    the config begin beyond the longest text that is checked. Raises UnsupportedModel with the
    reason.
    """
    embeddings = own_part(plain(base.module.get_input_embeddings().weight))
    max_abs_embedding = float(embeddings.abs().max())
    if not isfinite(max_abs_embedding):
        raise UnsupportedModel(f"{base.name} has input embeddings that are not finite")
    context, vocab_size = base.context, base.shape.vocab_size
    chunk = _chunk(base, prefill_chunk)
    if not base.computes_exactly:
        return _check_rounded(base, block_size, chunk, max_abs_embedding)
    lengths = _lengths(base, onsets_of(base.module.config, context=context))
    with float32_arithmetic(base.module, scratch_bytes=_scratch_bytes(base, max([0, *lengths]))):
        comparison = Comparison(dataclasses.replace(base, dtype=torch.float32), block_size)
        texts, truths = comparison.require_equal(
            short_texts(
                block_size=block_size,
                chunk=chunk,
                context=context,
                vocab_size=vocab_size,
                seed=seed,
            )
            for seed in range(_TEXTS_TRIED)
        )
        for length in lengths:
            comparison.require_equal(
                [long_text(length, chunk=max(chunk, 128), vocab_size=vocab_size, seed=seed)]
                for seed in range(_TEXTS_TRIED)
            )
    least, greatest = TOLERANCE
    evidence = Evidence(texts, truths, largest=greatest, median=least)
    if base.dtype is not torch.float32:
        errors = _check_serving_dtype(Comparison(base, block_size), texts[:2], truths[:2])
        evidence = Evidence.of_rounding(texts, truths, errors)
    limits = Limits(
        max_abs_embedding=MARGIN * max_abs_embedding,
        max_abs_kv=MARGIN * comparison.max_abs_kv,
    )
    return Checked(limits, evidence)


def _check_rounded(
    base: LoadedBase, block_size: int, chunk: int, max_abs_embedding: float
) -> Checked:
    """Check a model whose quantized layers round their inputs, or compute in half precision alone:
    a difference of a millionth moves a rounded input by a whole step, so that the bound is that of
    half precision, in the serving dtype."""
    texts = short_texts(
        block_size=block_size,
        chunk=chunk,
        context=base.context,
        vocab_size=base.shape.vocab_size,
        seed=0,
    )
    comparison = Comparison(base, block_size)
    truths = [comparison.truth(text) for text in texts]
    errors = [error for *_, error in comparison.differences(texts, truths)]
    if not median(errors) <= HALF_TOLERANCE:
        raise UnsupportedModel(
            f"{base.name}, quantized with {base.scheme}, gives other logits over KV blocks than by "
            f"itself: they differ by {median(errors):.2g} of their standard deviation (expected at "
            f"most {HALF_TOLERANCE:g})"
        )
    limits = Limits(
        max_abs_embedding=MARGIN * max_abs_embedding, max_abs_kv=MARGIN * comparison.max_abs_kv
    )
    return Checked(limits, Evidence.of_rounding(texts, truths, errors))


def _chunk(base: LoadedBase, prefill_chunk: int) -> int:
    """Tokens of the longest chunk that is run."""
    num_parameters = sum(weight.numel() for weight in base.module.parameters())
    if base.device.type == "cpu" and num_parameters > _LARGE:
        return min(prefill_chunk, _LARGE_CHUNK)
    return min(prefill_chunk, _MAX_LENGTH // 2)


def _lengths(base: LoadedBase, onsets: list[Onset]) -> list[int]:
    """Lengths of texts that reach past the onsets; those beyond the limit are logged."""
    lengths = []
    for onset in onsets:
        if onset.position > _MAX_LENGTH - _PAST:
            log.warning(
                "%s was not checked from position %d on, where %s of its config changes the "
                "output: the longest text of the self-check has %d tokens",
                base.name,
                onset.position,
                onset.key,
                _MAX_LENGTH,
            )
        else:
            past = onset.position + onset.position // 8 + _PAST
            lengths.append(min(past, _MAX_LENGTH, base.context))
    return lengths


def _scratch_bytes(base: LoadedBase, length: int) -> int:
    """Memory for the KV and the eager attention of the longest text."""
    shape = base.shape
    kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    return 4 * length * (kv + 3 * shape.num_heads * length)


def _check_serving_dtype(
    comparison: Comparison, texts: list[Text], truths: list[Truth]
) -> list[float]:
    """Run texts as they are served, where rounding hides small differences: a kernel or a
    cast may fail in half precision alone, and float16 may overflow. Returns the differences."""
    name, dtype = comparison.base.name, str(comparison.base.dtype).removeprefix("torch.")
    errors = [error for *_, error in comparison.differences(texts, truths)]
    if not all(isfinite(error) for error in errors):
        raise UnsupportedModel(f"{name} gives logits that are not finite in {dtype}")
    if (error := median(errors)) > HALF_TOLERANCE:
        raise UnsupportedModel(
            f"{name} gives other logits in {dtype} than in float32: they differ by {error:.2g} of "
            f"their standard deviation (expected at most {HALF_TOLERANCE:g})"
        )
    return errors
