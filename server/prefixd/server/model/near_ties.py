"""Find the tokens whose choice of experts rounding may change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_GAP = 1e-5
"""Scores closer than this, relative to the greatest one, may change places by rounding."""


@contextmanager
def near_ties(num_tokens: int) -> Iterator[torch.Tensor]:
    """Yields a mask [num_tokens] on the host, which becomes True where a ``topk`` over scores of
    each token leaves out a score that nearly equals the last one chosen."""
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    with _Watch(mask):
        yield mask


class _Watch(TorchFunctionMode):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self._mask = mask

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in {torch.topk, torch.Tensor.topk}:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(self, input: torch.Tensor, k: int, dim: int = -1, **_: Any) -> None:  # noqa: A002
        scores = input.movedim(dim, -1)
        rows = scores.numel() // scores.shape[-1]
        if k >= scores.shape[-1] or rows % len(self._mask):
            return
        best = scores.topk(k + 1).values.float()
        near = best[..., k - 1] - best[..., k] <= _GAP * best.abs().amax(-1)
        self._mask |= near.reshape(len(self._mask), -1).any(-1).cpu()
