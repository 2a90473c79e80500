"""Draws: which token one number in [0, 1) selects from a row of probabilities.

Probabilities are summed as integers, in units of 2**-60, so a sum does not depend on the order of
its parts. A row therefore gives the same token by any of the ways below, on any device, and
regardless of the other rows that are computed with it. Nothing here reads a value back from the
device, and no shape depends on data.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

ONE = 1 << 60
"""Probability 1. A float32 of at least 2**-36 has no bits below the unit."""

GREEDY_BELOW = 1e-5
"""Temperatures from which a row is drawn: a smaller divisor overflows. vLLM has the same limit."""

HEAD = 1024
"""The most tokens of a row that are selected in order of probability; a sort orders all."""
_SMALL_HEAD = 64
_PART = 256  # weights that are summed at once; the parts of a row are searched before one's inside
_LOW = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Filters:
    """Filters of n rows: ``top_k`` [n] int64 is at least 1, and the size of the vocabulary where
    it is off; ``top_p`` and ``min_p`` are [n] float32."""

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


def head_width(top_k: int) -> int:
    """How many of the most probable tokens to select for rows with at most this ``top_k``."""
    return _SMALL_HEAD if top_k <= _SMALL_HEAD else HEAD


def weights(probs: torch.Tensor) -> torch.Tensor:
    """Probabilities (float32, at most 1) as integers, in units of 1 / ONE. Overwrites ``probs``."""
    return probs.mul_(float(ONE)).long()


def look_up(weight: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index [n] at which the cumulative sum of ``weight`` [n, width] passes ``uniform`` (float64).

    Its weight is not 0, unless all are. Longer rows are summed in parts, since a cumulative sum
    over a vocabulary is slow.
    """
    width = weight.shape[1]
    if width <= HEAD:
        return _search(weight.cumsum(dim=-1), uniform)
    if width % 64:
        weight = pad(weight, (0, -width % _PART))
    size = min(_PART, weight.shape[1] & -weight.shape[1])
    parts = weight.view(len(weight), -1, size)
    sums = parts.sum(dim=-1)
    cumulative = sums.cumsum(dim=-1)
    target = _target(cumulative, uniform)
    part = _passed(cumulative, target)
    before = (cumulative - sums).gather(1, part)
    inside = parts.gather(1, part[:, :, None].expand(-1, -1, size))[:, 0].cumsum(dim=-1)
    index = part * size + _passed(inside + before, target)
    return index.clamp(max=width - 1)[:, 0]


def head(probs: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` most probable tokens of each row: probabilities and ids [n, width], in order of
    probability, equal ones in order of id."""
    ids = torch.arange(probs.shape[1], device=probs.device)
    best = _keys(probs, _LOW - ids).topk(min(width, probs.shape[1])).values
    return (best >> 32).int().view(torch.float32), _LOW - (best & _LOW)


def in_order(probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens, as ``head`` orders them."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    return ordered, ids


def likeliest(logprobs: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` tokens with the largest log-probabilities: these and the ids [n, count],
    largest first, equal ones in order of id."""
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    best = _keys(logprobs.abs(), ids).topk(count, largest=False).values
    return -((best >> 32).int().view(torch.float32)), best & _LOW


def cut(
    ordered: torch.Tensor, filters: Filters, *, num_ids: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, width] of the tokens that the filters keep, 0 elsewhere. ``ordered`` holds the
    largest of ``num_ids`` probabilities in descending order, and is overwritten.

    Also returns [n]: True when every token outside ``ordered`` is cut too.
    """
    width = ordered.shape[1]
    top_k = filters.top_k[:, None]
    keep = torch.arange(width, device=ordered.device) < top_k
    keep &= ordered >= filters.min_p[:, None] * ordered[:, :1]
    weight = weights(ordered).mul_(keep)
    cumulative = weight.cumsum(dim=-1)
    # top_p applies to the mass that top_k and min_p kept: all of it when they are off.
    ended = ~keep[:, -1:] | (top_k <= width)
    unfiltered = (top_k == num_ids) & (filters.min_p[:, None] == 0)
    mass = torch.where(unfiltered, ONE, cumulative[:, -1:])
    # A token is kept while the mass before it is below top_p. The first is always kept, even when
    # top_p underflows in float32.
    short = (cumulative - weight).double() < filters.top_p[:, None].double() * mass.double()
    short[:, 0] = True
    settled = ended | (unfiltered & ~short[:, -1:])
    return weight.mul_(short), settled[:, 0]


def _keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Integers in the order of ``values``, which are not negative, and then of ``ids``."""
    return values.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(ids)


def _search(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    return _passed(cumulative, _target(cumulative, uniform))[:, 0]


def _target(cumulative: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The sum [n, 1] that ``uniform`` stands for; always below the sum of the whole row."""
    total = cumulative[:, -1:]
    return torch.minimum((uniform[:, None] * total.double()).long(), total - 1)


def _passed(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index [n, 1] whose cumulative sum is above ``target``; a valid one in any case."""
    passed = (cumulative <= target).sum(dim=-1, keepdim=True)
    return passed.clamp(max=cumulative.shape[1] - 1)
