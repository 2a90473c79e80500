"""What rounding costs: how well a decoder predicts ordinary text, next to the unrounded model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.plain_texts import count_blocks, run_texts

MAX_PERPLEXITY_RATIO, MIN_AGREEMENT = 1.25, 0.8


@dataclass(frozen=True, slots=True)
class Predictions:
    """Of the n tokens after the first of each text: the log probability of the token that follows
    [n], and the likeliest token [n]."""

    log_probs: torch.Tensor
    best: torch.Tensor

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log probability."""
        return float((-self.log_probs.mean()).exp())


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of the rounded and of the unrounded model on the same text, and the part of its
    tokens at which both have the same likeliest token."""

    perplexity: float
    unrounded: float
    agreement: float

    @property
    def ratio(self) -> float:
        """How many times as large the perplexity is."""
        return self.perplexity / self.unrounded

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.2f} on ordinary text, {self.ratio:.3f} times the "
            f"unrounded model's {self.unrounded:.2f}; the same likeliest token at "
            f"{self.agreement:.1%} of positions"
        )

    @classmethod
    def of(cls, rounded: Predictions, unrounded: Predictions) -> "Quality":
        """The quality of predictions of the same texts."""
        agreement = float((rounded.best == unrounded.best).double().mean())
        return cls(rounded.perplexity, unrounded.perplexity, agreement)


@torch.inference_mode()
def predict(
    decoder: Decoder, texts: Sequence[list[int]], *, num_blocks: int | None = None
) -> Predictions:
    """Run texts over an unused pool of ``num_blocks`` (None: enough), together where they fit, else
    one by one."""
    together = num_blocks is None or count_blocks(texts, decoder.block_size) < num_blocks
    groups = [range(len(texts))] if together else [[number] for number in range(len(texts))]
    parts = {}  # by number of the text and position: the order of passes depends on the pool
    for group in groups:
        for index, start, logits in run_texts(decoder, [texts[number] for number in group]):
            following = torch.tensor(texts[group[index]][start + 1 : start + 1 + len(logits)])
            parts[group[index], start] = _predicted(logits[: len(following)], following)
    log_probs, best = zip(*(parts[key] for key in sorted(parts)), strict=True)
    return Predictions(torch.cat(log_probs), torch.cat(best))


def _predicted(logits: torch.Tensor, following: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log probabilities of tokens ``following`` [n] under ``logits`` [n, ids], and the likeliest
    tokens."""
    logits = logits.float().cpu()
    log_probs = logits.log_softmax(-1).gather(1, following[:, None])[:, 0]
    return log_probs.double(), logits.argmax(-1)


def require_acceptable(quality: Quality, name: str) -> None:
    """Raise UnsupportedModel for a model that rounding broke, or that it makes compute NaN."""
    if quality.ratio <= MAX_PERPLEXITY_RATIO and quality.agreement >= MIN_AGREEMENT:
        return
    raise UnsupportedModel(
        f"{name} in int8 has the {quality}; expected at most {MAX_PERPLEXITY_RATIO:g} times and at "
        f"least {MIN_AGREEMENT:.0%}. Serve it without --quantize int8"
    )
