"""Which operations sample the rows of a step, and where their settings are in one buffer."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of one call, on which the operations depend and nothing else does: one of its kind
    can be captured into a graph.

    ``rows`` are sampled, of those of the logits that are listed (``listed``), or of all. ``plain``,
    ``heads`` and ``sorts`` of them are drawn: without a filter, among the ``width`` most probable
    tokens, and after a sort. ``penalised`` have penalties, ``masked`` have bit masks, of
    ``mask_words`` words of 32 bits in all. ``drafted``, ``biases`` and ``bans`` are entries.
    ``logprobs`` rows ask for log-probabilities, with ``top`` alternatives.
    """

    rows: int
    listed: bool = False
    plain: int = 0
    heads: int = 0
    width: int = 0
    sorts: int = 0
    penalised: int = 0
    drafted: int = 0
    biases: int = 0
    bans: int = 0
    masked: int = 0
    mask_words: int = 0
    logprobs: int = 0
    top: int = 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return bool(self.penalised or self.biases or self.bans or self.masked)

    @property
    def has_greedy(self) -> bool:
        """Whether a row takes its largest logit, if not by its settings then because no group has
        all rows."""
        return self.rows not in {self.plain, self.heads, self.sorts}

    @property
    def reads_logits(self) -> bool:
        """Whether more of the logits is needed than the largest."""
        return self.adjusts or bool(self.plain or self.heads or self.sorts or self.logprobs)


class _Section(NamedTuple):
    name: str
    dtype: torch.dtype
    start: int
    stop: int


@cache
def _sections(plan: Plan) -> tuple[_Section, ...]:
    """Places in bytes. The rows of a group that has all of them are not listed."""
    sizes: list[tuple[str, torch.dtype, int]] = [("rows", torch.int64, plan.rows * plan.listed)]
    for name, size in (("plain", plan.plain), ("head", plan.heads), ("sort", plan.sorts)):
        sizes += [
            (f"{name}_rows", torch.int64, size if size < plan.rows else 0),
            (f"{name}_uniform", torch.float64, size),
            (f"{name}_temperature", torch.float32, size),
        ]
        if name != "plain":
            sizes += [(f"{name}_top_k", torch.int64, size), (f"{name}_top_p", torch.float32, size)]
            sizes += [(f"{name}_min_p", torch.float32, size)]
    names = ("repetition", "frequency", "presence")
    sizes += [(name, torch.float32, plan.penalised) for name in names]
    sizes += [("penalised_rows", torch.int64, plan.penalised)]
    sizes += [("penalised_slots", torch.int64, plan.penalised)]
    sizes += [("penalised_counts", torch.int32, plan.penalised)]
    sizes += [("drafted_index", torch.int64, plan.drafted)]
    sizes += [("drafted_value", torch.int32, plan.drafted)]
    sizes += [("bias_index", torch.int64, plan.biases), ("bias_value", torch.float32, plan.biases)]
    sizes += [("masked_rows", torch.int64, plan.masked)]
    sizes += [("mask_words", torch.int32, plan.mask_words)]
    sizes += [("ban_index", torch.int64, plan.bans), ("logprob_rows", torch.int64, plan.logprobs)]
    sections, start = [], 0
    for name, dtype, size in sizes:
        if size:
            sections.append(_Section(name, dtype, start, start + size * dtype.itemsize))
            start += -(-size * dtype.itemsize // 16) * 16
    return tuple(sections)


def num_bytes(plan: Plan) -> int:
    """What the inputs of a call take."""
    sections = _sections(plan)
    return sections[-1].stop if sections else 0


def views(buffer: torch.Tensor, plan: Plan) -> dict[str, torch.Tensor]:
    """The sections that the plan has, in a buffer of bytes."""
    return {s.name: buffer[s.start : s.stop].view(s.dtype) for s in _sections(plan)}
