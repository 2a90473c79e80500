"""Check the decoder that serves against the logits that the self-check found to be the model's own.

The self-check runs the unmodified module; lean layers and native kernels compute the same in other
code, which may be wrong for one model, one processor or one version of a library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

import torch

from prefixd.server.model.decoder import Decoder
from prefixd.server.model.selfcheck_compare import Truth, differences
from prefixd.server.model.selfcheck_texts import Text

_ROUNDING = 2.0
"""In half precision a decoder may differ from the truth by this many times as much as the module
does: both round, and a wrong position or weight differs by far more."""


class DecoderRefused(Exception):
    """The decoder of the name ``decoder`` gives other logits than the model; the message says how
    large the difference is."""

    def __init__(self, decoder: str, difference: str) -> None:
        super().__init__(f"{decoder} gives other logits than the model: {difference}")
        self.decoder = decoder


@dataclass(frozen=True, slots=True)
class Evidence:
    """Texts with the model's own logits in float32, and the bounds of a decoder's differences
    (multiples of the logits' standard deviation): of the largest one and of the median."""

    texts: Sequence[Text]
    truths: Sequence[Truth]
    largest: float
    median: float

    @classmethod
    def of_rounding(
        cls, texts: Sequence[Text], truths: Sequence[Truth], errors: Sequence[float]
    ) -> "Evidence":
        """Bounds from the ``errors`` of the module in half precision."""
        return cls(texts, truths, _ROUNDING * max(errors), _ROUNDING * median(errors))


@torch.inference_mode()
def check_decoder(decoder: Decoder, evidence: Evidence, *, num_blocks: int) -> None:
    """Run the texts on an unused pool of ``num_blocks``, those that fit. Raises DecoderRefused."""
    fitting = [
        (text, truth)
        for text, truth in zip(evidence.texts, evidence.truths, strict=True)
        if text.num_blocks(decoder.block_size) < num_blocks
    ]
    for text, truth in fitting:
        _check([text], [truth], decoder, evidence)
    together = sum(text.num_blocks(decoder.block_size) for text, _ in fitting)
    if len(fitting) > 1 and together < num_blocks:
        _check([text for text, _ in fitting], [truth for _, truth in fitting], decoder, evidence)


def _check(texts: list[Text], truths: list[Truth], decoder: Decoder, evidence: Evidence) -> None:
    decoder.zero(range(1, 1 + sum(text.num_blocks(decoder.block_size) for text in texts)))
    rows = [
        (part, position, error)
        for part, position, error in differences(decoder, texts, truths)
        if not _follows_tie(truths[part.text], position)
    ]
    errors = [error for *_, error in rows]
    if not errors or (
        all(isfinite(error) for error in errors)
        and max(errors) <= evidence.largest
        and median(errors) <= evidence.median
    ):
        return
    _, position, largest = max(rows, key=lambda row: row[2] if isfinite(row[2]) else float("inf"))
    raise DecoderRefused(
        decoder.name,
        f"they differ by up to {largest:.2g} of their standard deviation, at position {position} "
        "of a text of "
        f"{max(len(text.tokens) for text in texts)} tokens, and by {median(errors):.2g} at half of "
        f"the positions; expected at most {evidence.largest:.2g} and {evidence.median:.2g}",
    )


def _follows_tie(truth: Truth, position: int) -> bool:
    """Whether rounding may have chosen other experts there."""
    return truth.first_tie is not None and truth.first_tie <= position
