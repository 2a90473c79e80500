"""Attention of the requests of one pass, each over its own positions.

The encoder attends each input whole, without padding. The decoder attends over blocks: rows of one
token in groups of similar length, padded by the null block, and longer ones by themselves.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model.encoder_decoder.hooks import Attention, Bias
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.transfer import on_device


class EncoderPass:
    """One pass of the encoder over inputs of ``lengths``, one after another."""

    outputs = None

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths = lengths
        self._device = device
        self._bias: tuple[Bias, torch.Tensor] | None = None
        self.positions = on_device(np.concatenate([np.arange(n) for n in lengths]), device)

    def attend_self(self, attention: Attention, states: torch.Tensor) -> torch.Tensor:
        """Every token of an input sees all of it."""
        queries = attention.queries(states)
        keys, values = attention.keys_and_values(states)
        bias = None if attention.bias is None else self._bias_of(attention.bias)
        parts, start = [], 0
        for length in self._lengths:
            query, key, value = (
                part[start : start + length].transpose(0, 1)[None]
                for part in (queries, keys, values)
            )
            mask = None if bias is None else bias[None, :, :length, :length].to(query.dtype)
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=attention.scale
            )
            parts.append(attended[0].transpose(0, 1))
            start += length
        return torch.cat(parts)

    def attend_source(self, attention: Attention, states: torch.Tensor) -> torch.Tensor:
        """An encoder has no cross-attention."""
        raise AssertionError(f"{attention} of an encoder attends {len(states)} states to an input")

    def _bias_of(self, bias: Bias) -> torch.Tensor:
        """[num_heads, n, n] for the longest input; that of a shorter one is its corner."""
        if self._bias is None or self._bias[0] is not bias:
            places = torch.arange(max(self._lengths), device=self._device)
            self._bias = bias, bias.of(places - places[:, None])
        return self._bias[1]


@dataclass(frozen=True, slots=True)
class Span:
    """``length`` tokens at ``offset`` in the flat row, from position ``start`` of their request;
    they see ``visible`` positions of ``blocks``, or up to their own where that is None."""

    offset: int
    length: int
    start: int
    blocks: Sequence[int]
    visible: int | None = None

    @property
    def end(self) -> int:
        """Positions that the last token sees."""
        return self.start + self.length if self.visible is None else self.visible


@dataclass(frozen=True, slots=True)
class _Group:
    """R spans of Q tokens each over T positions, padded: ``tokens`` [R * Q] of the flat row,
    ``slots`` [R * T] of the pool, ``hidden`` [R, Q, T] is True where a token does not see a
    position, ``distances`` [R, Q, T] are key positions minus query positions."""

    num_rows: int
    tokens: torch.Tensor
    slots: torch.Tensor
    hidden: torch.Tensor
    distances: torch.Tensor

    def attend(
        self,
        queries: torch.Tensor,
        pool: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[R * Q, num_heads, head_dim]. ``pool``: keys and values [slots, num_heads, head_dim];
        ``bias`` as of ``bias_of``."""
        rows = self.num_rows
        heads, width = queries.shape[1:]
        query = queries[self.tokens].view(rows, -1, heads, width).transpose(1, 2)  # [R, H, Q, D]
        key, value = (
            part[self.slots].view(rows, -1, heads, width).transpose(1, 2) for part in pool
        )  # [R, H, T, D]
        attended = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return attended.transpose(1, 2).flatten(0, 1)

    def bias_of(self, bias: Bias | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to scores, [R, 1 or num_heads, Q, T]: -inf where a position is hidden."""
        if bias is None:
            added = torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device)[:, None]
        else:
            added = bias.of(self.distances).transpose(0, 1).to(dtype)
        return added.masked_fill(self.hidden[:, None], float("-inf"))


class Spans:
    """Attention of spans over blocks of the pool."""

    def __init__(self, spans: Sequence[Span], cache: KVCache) -> None:
        self._cache = cache
        self._groups = [_group(members, cache) for members in _by_size(spans)]
        self._bias: tuple[Bias | None, list[torch.Tensor]] | None = None

    def attend(self, attention: Attention, queries: torch.Tensor) -> torch.Tensor:
        """Attend with ``queries`` [n, num_heads, head_dim]; returns their shape."""
        keys, values = self._cache.by_head(attention.layer)
        shape = (-1, attention.num_heads, attention.head_dim)
        pool = keys.view(shape), values.view(shape)
        if self._bias is None or self._bias[0] is not attention.bias:
            added = [group.bias_of(attention.bias, queries.dtype) for group in self._groups]
            self._bias = attention.bias, added
        out = torch.empty_like(queries)
        for group, bias in zip(self._groups, self._bias[1], strict=True):
            out[group.tokens] = group.attend(queries, pool, bias, attention.scale)
        return out


def _by_size(spans: Sequence[Span]) -> Iterable[list[Span]]:
    """Spans that are attended together: of one token and similar length, so that padding at most
    doubles the work."""
    groups: defaultdict[tuple[int, int], list[Span]] = defaultdict(list)
    for span in spans:
        alone = 0 if span.length == 1 else 1 + span.offset
        groups[alone, span.end.bit_length()].append(span)
    return groups.values()


def _group(spans: list[Span], cache: KVCache) -> _Group:
    ends = np.array([span.end for span in spans])
    length, width, size = spans[0].length, int(ends.max()), cache.block_size
    slots = np.full((len(spans), width), NULL_BLOCK * size)
    for row, span in enumerate(spans):
        places = np.arange(span.end)
        slots[row, : span.end] = np.asarray(span.blocks)[places // size] * size + places % size
    tokens = np.array([span.offset for span in spans])[:, None] + np.arange(length)
    own = np.array([span.start for span in spans])[:, None] + np.arange(length)  # [R, Q]
    all_visible = np.array([span.visible is not None for span in spans])[:, None]
    last = np.where(all_visible, ends[:, None] - 1, own)
    keys = np.arange(width)
    device = cache.device
    return _Group(
        num_rows=len(spans),
        tokens=on_device(tokens.reshape(-1), device),
        slots=on_device(slots.reshape(-1), device),
        hidden=on_device(keys > last[:, :, None], device).bool(),
        distances=on_device(keys - own[:, :, None], device),
    )


class DecoderPass:
    """One pass of the decoder: the requests' own positions, and those of their inputs."""

    def __init__(
        self,
        own: Sequence[Span],
        source: Sequence[Span],
        *,
        cache: KVCache,
        outputs: Sequence[int],
    ) -> None:
        """``own`` and ``source`` are of the same tokens; ``outputs``: those whose logits are
        wanted."""
        device = cache.device
        positions = np.concatenate([np.arange(s.start, s.start + s.length) for s in own])
        self.positions = on_device(positions, device)
        self.outputs = on_device(outputs, device)
        self._cache = cache
        self._own, self._source = Spans(own, cache), Spans(source, cache)
        self._slots = on_device(
            np.concatenate([_slots(s.blocks, s.start, s.length, cache.block_size) for s in own]),
            device,
        )

    def attend_self(self, attention: Attention, states: torch.Tensor) -> torch.Tensor:
        """Write the tokens' keys and values to the pool, and attend to those so far."""
        write(self._cache, attention.layer, self._slots, attention.keys_and_values(states))
        return self._own.attend(attention, attention.queries(states))

    def attend_source(self, attention: Attention, states: torch.Tensor) -> torch.Tensor:
        """Attend to all of the request's input."""
        return self._source.attend(attention, attention.queries(states))


def write(
    cache: KVCache,
    layer: int,
    slots: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Store keys and values, each [n, num_heads, head_dim], at ``slots`` [n] of the pool."""
    keys, values = kv
    cache.write(layer, slots, keys.flatten(1), values.flatten(1))


def source_slots(
    blocks: Sequence[Sequence[int]], lengths: Sequence[int], cache: KVCache
) -> torch.Tensor:
    """The slots of several inputs of ``lengths``, one after another."""
    parts = [_slots(b, 0, n, cache.block_size) for b, n in zip(blocks, lengths, strict=True)]
    return on_device(np.concatenate(parts), cache.device)


def _slots(blocks: Sequence[int], start: int, length: int, size: int) -> np.ndarray:
    places = np.arange(start, start + length)
    slots: np.ndarray = np.asarray(blocks)[places // size] * size + places % size
    return slots
