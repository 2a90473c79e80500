"""Requests to an encoder-decoder: the prompt is the encoder's input, and output has its own room.

A soft prompt stands in front of the input and takes positions of the encoder, a KV prefix takes
positions of the decoder. KV of the input stays in blocks of the request's own, for cross-attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from prefixd.server.api.generate.prompt_scores import PromptOptions
from prefixd.server.api.generate.prompts import counted
from prefixd.server.api.placement import Layout
from prefixd.server.api.served import EncoderInfo, ServedModel
from prefixd.server.engine.request import AdmittedRequest
from prefixd.server.errors import BadRequest, DoesNotFit
from prefixd.store.artifact.kinds import Kind
from prefixd.store.store import Manifest


@dataclass(frozen=True, slots=True)
class EncoderInputs:
    """Admits inputs for the encoder under one prefix, or none. ``pool_tokens`` is that of
    ``SchedulerConfig.max_tokens_for``."""

    served: ServedModel
    encoder: EncoderInfo
    prefix: Manifest | None
    pool_tokens: Callable[..., int]

    @property
    def _virtual(self) -> int:
        return self.prefix.num_virtual_tokens if self.prefix else 0

    @property
    def _is_soft(self) -> bool:
        return self.prefix is not None and self.prefix.kind is Kind.SOFT_PROMPT

    def _num_encoded(self, num_tokens: int) -> int:
        return num_tokens + (self._virtual if self._is_soft else 0)

    def refuse_layout(self, layout: Layout | None) -> None:
        """Raise BadRequest for virtual tokens of prefix parts that stand elsewhere than in front of
        the input; templates are checked when they are set."""
        if layout is not None and layout.front != ((0, self._virtual),):
            raise BadRequest(
                "expected all virtual tokens in front of the prompt, as PEFT places them for an "
                "encoder-decoder; received others",
                code="misplaced_prefix",
                param="messages",
            )

    def refuse_scores(self, shown: PromptOptions) -> None:
        """Raise BadRequest for log-probabilities of the prompt: its tokens are not predicted."""
        if shown.scored_top is not None:
            raise BadRequest(
                "expected no log-probabilities of the prompt, which the encoder of an "
                "encoder-decoder reads all together",
                code="prompt_not_scored",
                param="echo" if shown.top is None else "prompt_logprobs",
            )

    def output_tokens(
        self, num_tokens: int, max_tokens: int | None, default_max_tokens: int | None
    ) -> int:
        """Limit of the output for an input. Raises DoesNotFit for one that can never run."""
        encoder, virtual = self.encoder, self._virtual
        encoded = self._num_encoded(num_tokens)
        if encoded > encoder.max_tokens:
            needed = counted(
                (encoded - num_tokens, "virtual tokens"), (num_tokens, "tokens of the prompt")
            )
            raise DoesNotFit(
                f"{needed} exceed the encoder's limit: expected at most {encoder.max_tokens} in "
                "all",
                param="prompt",
            )
        begun, before = len(encoder.start), 0 if self._is_soft else virtual
        positions = self.served.max_positions - before
        side = encoder.num_blocks(encoded)
        pool = self.pool_tokens(virtual, num_side_blocks=side, gated=self._is_soft)
        room = min(positions, pool) - begun
        open_ended = max_tokens is None and default_max_tokens is None
        output = max_tokens
        if output is None:
            output = max(1, room) if open_ended else min(default_max_tokens or 1, room)
        if output > room or room < 1:
            held = counted((virtual, "virtual tokens"), (num_tokens, "tokens of the prompt"))
            in_front = (0 if pool < positions else before, "virtual tokens in front of the output")
            limit = (
                f"the KV pool has room for {max(0, pool)} tokens next to {held}"
                if pool < positions
                else f"the decoder has {self.served.max_positions} positions"
            )
            needed = counted(
                in_front,
                (begun, "tokens that the decoder begins with"),
                (max(1, output), "tokens of output"),
            )
            raise DoesNotFit(
                f"{needed} can never fit: {limit}", param="max_tokens" if room > 0 else "prompt"
            )
        return output

    def admit(self, request: AdmittedRequest) -> AdmittedRequest:
        """``request``, whose prompt is the encoder's input."""
        prefix, source = request.prefix, request.prompt
        return replace(
            request,
            prompt=self.encoder.start,
            source=source,
            num_side_blocks=self.encoder.num_blocks(self._num_encoded(len(source))),
            prefix=None if prefix is None else replace(prefix, gated=self._is_soft),
            speculate=False,
        )
