"""Run an encoder-decoder once before serving: over KV blocks it must give the model's own logits.

Several inputs and outputs, each alone and whole under transformers' own attention, are compared
with the same in one batch: one input with its first tokens as a soft prompt, outputs in chunks and
token by token. In float32, in any serving dtype, as for decoders (decision 0010).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from math import isfinite
from statistics import median
from typing import Any

import torch

from prefixd.server.engine.step import Chunk, GatedRows, Source
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.attention import IMPLEMENTATION
from prefixd.server.model.batch import lay_out
from prefixd.server.model.encoder_decoder.layout import packed
from prefixd.server.model.float32 import float32_arithmetic
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.pair_decoder import PairDecoder
from prefixd.server.model.selfcheck import HALF_TOLERANCE, MARGIN, Limits
from prefixd.server.model.selfcheck_compare import TOLERANCE

_SCRATCH_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Text:
    """An input and an output; the first ``soft`` tokens of the input run as a soft prompt, and the
    first ``chunk`` of the output in one pass."""

    source: tuple[int, ...]
    output: tuple[int, ...]
    soft: int
    chunk: int


@torch.no_grad()
def check_pair(base: LoadedBase, *, block_size: int) -> Limits:
    """Check that the model can be served, and derive the bounds of uploaded values from it. Raises
    UnsupportedModel with the reason."""
    embeddings = base.module.get_input_embeddings()
    every_id = torch.arange(base.num_embeddings, device=base.device)
    max_abs_embedding = float(embeddings(every_id).abs().max())
    if not isfinite(max_abs_embedding):
        raise UnsupportedModel(f"{base.name} has input embeddings that are not finite")
    texts = _texts(base, block_size)
    with float32_arithmetic(base.module, scratch_bytes=_SCRATCH_BYTES):
        truths = [_own_logits(base, text) for text in texts]
        wide = dataclasses.replace(base, dtype=torch.float32)
        errors, max_abs_kv = _errors(wide, texts, truths, block_size)
        if not max(errors) <= TOLERANCE[1]:
            raise UnsupportedModel(
                f"{base.name} gives other logits over KV blocks than by itself: they differ by up "
                f"to {max(errors):.2g} of their standard deviation; expected at most "
                f"{TOLERANCE[1]:.2g}"
            )
    if base.dtype is not torch.float32:
        _check_serving_dtype(base, texts, truths, block_size)
    return Limits(MARGIN * max_abs_embedding, MARGIN * max_abs_kv)


def _check_serving_dtype(
    base: LoadedBase, texts: list[_Text], truths: list[torch.Tensor], block_size: int
) -> None:
    errors, _ = _errors(base, texts, truths, block_size)
    dtype = str(base.dtype).removeprefix("torch.")
    if not all(isfinite(error) for error in errors):
        raise UnsupportedModel(f"{base.name} gives logits that are not finite in {dtype}")
    if (error := median(errors)) > HALF_TOLERANCE:
        raise UnsupportedModel(
            f"{base.name} gives other logits in {dtype} than in float32: they differ by "
            f"{error:.2g} of their standard deviation (expected at most {HALF_TOLERANCE:g})"
        )


def _texts(base: LoadedBase, block_size: int) -> list[_Text]:
    """A short text, one whose input and output cross a block border, and one whose input begins
    with a soft prompt."""
    assert base.pair is not None
    generator = torch.Generator().manual_seed(0)
    most = min(base.context, base.pair.max_source or base.context) - 1

    def tokens(length: int) -> tuple[int, ...]:
        drawn = torch.randint(base.num_embeddings, (min(length, most),), generator=generator)
        return tuple(drawn.tolist())

    size = block_size
    return [
        _Text(tokens(5), base.pair.start + tokens(4), 0, 1),
        _Text(tokens(2 * size + 3), base.pair.start + tokens(size + 2), 0, size // 2),
        _Text(tokens(size + 5), base.pair.start + tokens(3), 4, 2),
    ]


def _own_logits(base: LoadedBase, text: _Text) -> torch.Tensor:
    """The model's own logits [n, vocab] after each token of the output."""
    module = base.module
    try:
        module.set_attn_implementation("eager")
        logits: torch.Tensor = module(
            input_ids=torch.tensor([text.source], device=base.device),
            decoder_input_ids=torch.tensor([text.output], device=base.device),
            use_cache=False,
        ).logits[0]
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as failure:
        raise UnsupportedModel(f"{base.name} cannot be run: {failure}") from failure
    finally:
        module.set_attn_implementation(IMPLEMENTATION)
    if not logits.isfinite().all():
        raise UnsupportedModel(
            f"{base.name} gives logits that are not finite in float32; expected weights without "
            "NaN or infinity"
        )
    return logits


def _errors(
    base: LoadedBase, texts: list[_Text], truths: list[torch.Tensor], block_size: int
) -> tuple[list[float], float]:
    """The largest difference of a logit after each token, as a multiple of the standard deviation
    of all logits there; and the largest absolute value of the pool."""
    sizes = [len(t.source) + len(t.output) + t.soft for t in texts]
    num_blocks = 1 + sum(3 + size // block_size for size in sizes)
    decoder = PairDecoder(base, num_blocks=num_blocks, block_size=block_size)
    free = count(1)
    placed = [_place(decoder, text, free) for text in texts]
    errors = []
    try:
        for chunks in _passes(texts, placed):
            outputs = list(range(sum(len(chunk.tokens) for chunk in chunks)))
            logits = decoder.forward(lay_out(chunks, outputs=outputs)).values.float()
            own = torch.cat([truths[c.seq_id][c.start : c.start + len(c.tokens)] for c in chunks])[
                :, : logits.shape[1]
            ]
            spread = own.std(-1).clamp_min(torch.finfo(torch.float32).tiny)
            errors += ((logits - own).abs().amax(-1) / spread).tolist()
    except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as failure:
        raise UnsupportedModel(f"{base.name} cannot be run over KV blocks: {failure}") from failure
    return errors, decoder.cache.largest()


@dataclass(frozen=True, slots=True)
class _Place:
    table: list[int]
    side_blocks: list[int]
    gated: GatedRows | None


def _place(decoder: PairDecoder, text: _Text, free: Iterator[int]) -> _Place:
    """Blocks of a text; its soft prompt is written to them."""

    def take(length: int) -> list[int]:
        return list(islice(free, -(-length // decoder.block_size)))

    gated = None
    if text.soft:
        ids = torch.tensor(text.source[: text.soft], device=decoder.device)
        shape, embed = decoder.base.shape, decoder.base.module.get_input_embeddings()
        kv_width = shape.num_kv_heads * shape.head_dim
        gated = GatedRows(tuple(take(text.soft)), text.soft)
        embeddings: Any = embed(ids).to(decoder.base.dtype)
        kv = packed(embeddings, num_layers=shape.num_layers, kv_width=kv_width)
        decoder.write_kv(gated.block_table, 0, kv)
    return _Place(take(len(text.output)), take(len(text.source)), gated)


def _passes(texts: list[_Text], placed: list[_Place]) -> Iterator[list[Chunk]]:
    """The first chunk of each output, then one token each until all have ended."""
    ends = [0] * len(texts)
    while any(end < len(text.output) for end, text in zip(ends, texts, strict=True)):
        chunks = []
        for index, (text, place) in enumerate(zip(texts, placed, strict=True)):
            start = ends[index]
            tokens = text.output[start : start + (1 if start else text.chunk)]
            if tokens:
                given = () if start else text.source[text.soft :]
                chunks.append(
                    Chunk(
                        index,
                        tokens,
                        start,
                        place.table,
                        source=Source(len(text.source), given),
                        side_blocks=place.side_blocks,
                        gated=place.gated,
                    )
                )
            ends[index] += len(tokens)
        yield chunks
