"""Check the decoder that serves against the logits that the self-check found to be the model's own.

The self-check runs the unmodified module; lean layers and native kernels compute the same in other
code, which may be wrong for one model, one processor or one version of a library.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
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
    """Run the texts on an unused pool of ``num_blocks``, those that fit, each alone and then all in
    one pass. Raises DecoderRefused."""
    fitting = [
        (text, truth)
        for text, truth in zip(evidence.texts, evidence.truths, strict=True)
        if text.num_blocks(decoder.block_size, decoder.state_blocks) < num_blocks
    ]
    groups = [[pair] for pair in fitting]
    if len(fitting) > 1 and _num_blocks([t for t, _ in fitting], decoder) < num_blocks:
        groups.append(fitting)
    rows = [row for group in groups for row in _run(decoder, group)]
    errors = [error for *_, error in rows]
    if not errors or (
        all(isfinite(error) for error in errors)
        and max(errors) <= evidence.largest
        and median(errors) <= evidence.median
    ):
        return
    length, position, largest = max(rows, key=lambda row: row[2] if isfinite(row[2]) else inf)
    raise DecoderRefused(
        decoder.name,
        f"they differ by up to {largest:.2g} of their standard deviation, at position {position} "
        f"of a text of {length} tokens, and by {median(errors):.2g} at half of the positions; "
        f"expected at most {evidence.largest:.2g} and {evidence.median:.2g}",
    )


def _run(decoder: Decoder, group: list[tuple[Text, Truth]]) -> list[tuple[int, int, float]]:
    """The length of the text, the position and the difference of all that are compared."""
    texts, truths = [text for text, _ in group], [truth for _, truth in group]
    decoder.zero(range(1, 1 + _num_blocks(texts, decoder)))
    return [
        (len(texts[part.text].tokens), position, error)
        for part, position, error in differences(decoder, texts, truths)
        if not _follows_tie(truths[part.text], position)
    ]


def _num_blocks(texts: Sequence[Text], decoder: Decoder) -> int:
    return sum(text.num_blocks(decoder.block_size, decoder.state_blocks) for text in texts)


def _follows_tie(truth: Truth, position: int) -> bool:
    """Whether rounding may have chosen other experts there."""
    return truth.first_tie is not None and truth.first_tie <= position
