"""Compare the logits of texts over KV blocks with the model's own."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch

from prefixd.server.model.architecture import FAILURES, UnsupportedModel
from prefixd.server.model.attention import IMPLEMENTATION
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.families import reference_attention, use_attention
from prefixd.server.model.float64 import NoFloat64, float64_arithmetic
from prefixd.server.model.kv_cache import state_layout
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.memory import free_bytes
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.near_ties import near_ties
from prefixd.server.model.selfcheck_texts import Compared, Part, Text, run_in_blocks

TOLERANCE = (1e-4, 1e-3)
"""Least and greatest bound of a logit's difference in float32, as a multiple of the standard
deviation of all logits at its position. In between, the bound is ten times the difference between
the model's own eager and SDPA attention: rounding, which grows with the depth of a model (5e-6 with
three layers, 3e-5 with the demo model's thirty). It is the greatest for a model with states."""

_GREATEST_OF_ALL = 0.05
"""Greatest bound for a text of which ten times what float32 changes in the model's own logits
exceeds the bound for all: scores far apart and sizes that differ much round a thousand times more
than usual."""

_ALWAYS_EAGER = 512
"""Tokens of a text whose eager attention is small for any model."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The model's own logits [n, vocab] at the n compared positions of a text, alone and whole,
    and the first position that a near tie of experts may have changed (None: there is none)."""

    logits: torch.Tensor
    first_tie: int | None


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """The first position of a text with other logits, and the text's largest difference, which
    exceeds its bound."""

    text: Text
    part: Part
    position: int
    error: float
    bound: float
    near_tie: bool


class Comparison:
    """Compares texts over KV blocks with the model's own logits, in the dtype of ``base``."""

    def __init__(self, base: LoadedBase, block_size: int) -> None:
        self.base = base
        self.block_size = block_size
        self.max_abs_kv = 0.0
        self._bound = TOLERANCE[0]
        self._first: tuple[Text, Truth] | None = None  # the rounding is measured on this text

    def require_equal(self, attempts: Iterable[list[Text]]) -> tuple[list[Text], list[Truth]]:
        """Check the first of the attempts that no near tie of experts spoils. The first text of all
        is short: the rounding of the model is measured on it, where that decides."""
        mismatch = None
        for texts in attempts:
            try:
                truths = [self.truth(text) for text in texts]
            except UnsupportedModel:
                list(self._run(texts))  # raises the reason with the name of the option, if any
                raise
            self._first = self._first or (texts[0], truths[0])
            mismatch = self.mismatch(texts, truths)
            if mismatch is None:
                return texts, truths
            if not mismatch.near_tie:
                break
        assert mismatch is not None
        raise UnsupportedModel(self._describe(mismatch))

    def truth(self, text: Text) -> Truth:
        """The model's own logits of a text."""
        with near_ties(len(text.tokens)) as ties:
            logits = self._own_logits(text.tokens, text.compared)
        if not logits.isfinite().all():
            raise UnsupportedModel(
                f"{self.base.name} gives logits that are not finite in float32; expected weights "
                "without NaN or infinity"
            )
        return Truth(logits, next(iter(ties.nonzero()[:, 0].tolist()), None))

    def _own_logits(
        self, tokens: Sequence[int], positions: list[int], *, attention: str | None = None
    ) -> torch.Tensor:
        """Logits [n, vocab] at n positions, all tokens in one forward pass of the bare model."""
        module, device = self.base.module, self.base.device
        try:
            use_attention(module, attention or self._reference(len(tokens)))
            logits: torch.Tensor = module(
                input_ids=torch.tensor([tokens], device=device),
                use_cache=False,
                logits_to_keep=torch.tensor(positions, device=device),
            ).logits[0]
        except FAILURES as failure:
            raise UnsupportedModel(f"{self.base.name} cannot be run: {failure}") from failure
        finally:
            use_attention(module, IMPLEMENTATION)
        return logits.float()

    def _reference(self, length: int) -> str:
        """Eager attention where that is right, unless its three tensors [heads, length, length]
        exceed free memory."""
        scores = 3 * 4 * self.base.shape.num_heads * length**2
        fits = length <= _ALWAYS_EAGER or scores < free_bytes(self.base.device)
        has_sdpa = getattr(self.base.module, "_supports_sdpa", False)
        return reference_attention(self.base.module) if fits or not has_sdpa else "sdpa"

    @cached_property
    def _rounding(self) -> float:
        """The largest difference that rounding explains, between the two tolerances."""
        least, greatest = TOLERANCE
        assert self._first is not None
        text, truth = self._first
        if reference_attention(self.base.module) == "sdpa" or self.base.layers.states:
            return greatest  # a scan over 260 tokens rounds more than attention does: by 3e-4
        try:
            other = self._own_logits(text.tokens, text.compared, attention="sdpa")
        except UnsupportedModel:
            return greatest
        return min(max(10 * max(_errors(other, truth.logits)), least), greatest)

    def _bound_of(self, text: Text, truth: Truth) -> float:
        """The bound for a text that exceeds the one for all: more, where the model's own logits in
        float32 are far from those in float64."""
        try:
            with float64_arithmetic(self.base.module):
                exact = self._own_logits(text.tokens, text.compared)
        except (NoFloat64, UnsupportedModel):
            return self._bound
        return max(self._bound, min(10 * max(_errors(exact, truth.logits)), _GREATEST_OF_ALL))

    def mismatch(self, texts: list[Text], truths: list[Truth]) -> _Mismatch | None:
        """The first wrong position of the first wrong text."""
        rows = list(self.differences(texts, truths))
        if all(error <= self._bound for *_, error in rows):
            return None
        self._bound = self._rounding
        wrong = [row for row in rows if not row[-1] <= self._bound]
        bounds = {index: self._bound_of(texts[index], truths[index]) for index in _texts_of(wrong)}
        wrong = [row for row in wrong if not row[-1] <= bounds[row[0].text]]
        if not wrong:
            return None
        part, position, _ = min(wrong, key=lambda row: (row[0].text, row[1]))
        tie = truths[part.text].first_tie
        return _Mismatch(
            text=texts[part.text],
            part=part,
            position=position,
            error=max(error for other, _, error in wrong if other.text == part.text),
            bound=bounds[part.text],
            near_tie=tie is not None and tie <= position,
        )

    def differences(
        self, texts: list[Text], truths: list[Truth]
    ) -> Iterator[tuple[Part, int, float]]:
        """Part, position and largest difference of a logit, as a multiple of the standard deviation
        of all logits there, for every compared position."""
        for compared in self._run(texts):
            yield from _errors_of(compared, texts, truths)

    def _run(self, texts: Sequence[Text]) -> Iterator[Compared]:
        """Run texts over KV blocks; raises UnsupportedModel when the model cannot be run so."""
        name = self.base.name
        base, size = self.base, self.block_size
        layout = state_layout(base.layers, block_size=size, dtype=base.dtype)
        state_blocks = 0 if layout is None else layout.num_blocks
        num_blocks = 1 + sum(text.num_blocks(size, state_blocks) for text in texts)
        decoder = ModuleDecoder(self.base, num_blocks=num_blocks, block_size=self.block_size)
        try:
            yield from run_in_blocks(decoder, texts)
        except FAILURES as failure:
            raise UnsupportedModel(f"{name} cannot be run over KV blocks: {failure}") from failure
        self.max_abs_kv = max(self.max_abs_kv, decoder.cache.largest())

    def _describe(self, mismatch: _Mismatch) -> str:
        text, part = mismatch.text, mismatch.part
        batch = f"with {part.sequences - 1} others" if part.sequences > 1 else "alone"
        return (
            f"{self.base.name} gives other logits over KV blocks than by itself: at position "
            f"{mismatch.position} of a text of {len(text.tokens)} tokens, whose positions "
            f"{part.start} to {part.stop - 1} ran {batch} in one pass. Largest difference "
            f"{mismatch.error:.2g} of the logits' standard deviation, expected at most "
            f"{mismatch.bound:.2g}. {self._reason(text, mismatch.bound)}"
        )

    def _reason(self, text: Text, bound: float) -> str:
        """What the logits of a wrong text depend on, found by running it alone. Differences up to
        ``bound`` are rounding."""
        half = list(range(-(-len(text.tokens) // 2)))
        first_half = self._own_logits(text.tokens[: len(half)], half)
        whole = self._own_logits(text.tokens, half)
        if max(_errors(first_half, whole)) > bound:
            return "Logits of earlier tokens depend on later tokens"
        in_one_pass = Text(text.tokens, (len(text.tokens),))
        if self.mismatch([in_one_pass], [self.truth(in_one_pass)]):
            return "It needs a feature that prefixd does not support"
        in_chunks = Text(text.tokens, text.ends)
        if self.mismatch([in_chunks], [self.truth(in_chunks)]):
            return "A token's logits depend on how its text is cut into chunks" + self._why_chunks()
        return "A token's logits depend on the other sequences of the batch"

    def _why_chunks(self) -> str:
        """What is known to depend on the chunk, for people."""
        limits = {getattr(part, "time_step_limit", None) for part in self.base.module.modules()}
        if limits <= {None, (0.0, inf)}:
            return ""
        return ": transformers applies its time_step_limit to several tokens at a time, not to one"


def _texts_of(rows: Iterable[tuple[Part, int, float]]) -> set[int]:
    return {part.text for part, *_ in rows}


def differences(
    decoder: Decoder, texts: Sequence[Text], truths: Sequence[Truth]
) -> Iterator[tuple[Part, int, float]]:
    """As ``Comparison.differences``, over an unused pool of any decoder."""
    for compared in run_in_blocks(decoder, texts):
        yield from _errors_of(compared, texts, truths)


def _errors_of(
    compared: Compared, texts: Sequence[Text], truths: Sequence[Truth]
) -> Iterator[tuple[Part, int, float]]:
    own = torch.stack(
        [
            truths[part.text].logits[texts[part.text].compared.index(position)]
            for part, position in compared.rows
        ]
    )
    # An id without an embedding has a logit of the module's, and none of a decoder's.
    errors = _errors(compared.logits, own[:, : compared.logits.shape[1]])
    for (part, position), error in zip(compared.rows, errors, strict=True):
        yield part, position, error


def _errors(logits: torch.Tensor, own: torch.Tensor) -> list[float]:
    """The largest difference at each position [n], as a multiple of the standard deviation of
    ``own`` [n, vocab] there."""
    spread = own.std(-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors: list[float] = ((logits.float() - own).abs().amax(-1) / spread).tolist()
    return errors
