"""The prompt in its answer: ``echo``, and the log-probabilities of its tokens.

The engine sends scores by place in the prompt that it runs, where virtual tokens have places too.
What is shown are the tokens of the request alone. The first has no score where nothing comes before
it: no text, and no virtual token whose output the model computes.

::

    prompt of the engine    v  a  b  v  c        v: virtual tokens, which are not shown
    scores, from 1 on          s1 s2 s3 s4       s3 means nothing
    shown                      a  b     c        with s1 s2 s4
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from typing import Any

from prefixd.server.api.admitted import Admitted, PromptText, PromptToken
from prefixd.server.api.generate.generation import Batch
from prefixd.server.api.generate.logprobs import prompt_table
from prefixd.server.api.generate.prompts import PromptTokens
from prefixd.server.api.served import Tokenizer
from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.engine.inputs import PLACEHOLDER
from prefixd.server.engine.request import (
    PositionLogprobs,
    PromptScore,
    ScoreEvent,
    TokenEvent,
    TokenLogprob,
)


def texts_of(prompts: Iterable[PromptTokens], tokenizer: Tokenizer) -> tuple[PromptText, ...]:
    """The prompts as they are shown."""
    return tuple(_text_of(prompt, tokenizer) for prompt in prompts)


def _text_of(prompt: PromptTokens, tokenizer: Tokenizer) -> PromptText:
    """The text that was tokenized, or what its tokens decode to."""
    detokenizer = tokenizer.detokenizer(())
    shown = [(place, token) for place, token in enumerate(prompt.token_ids) if token != PLACEHOLDER]
    before, texts = [], list[TokenText]()
    for _, token in shown:
        before.append(detokenizer.previous)
        texts += detokenizer.push(token)
    texts += detokenizer.flush()
    text = "".join([each.text for each in texts]) if prompt.text is None else prompt.text
    offsets = _offsets(texts, text)
    tokens = [
        PromptToken(token, place, previous, offset)
        # A flush may give text that belongs to no further token.
        for (place, token), previous, offset in zip(shown, before, offsets, strict=False)
    ]
    return PromptText(text, tuple(tokens))


def _offsets(texts: Sequence[TokenText], text: str) -> Iterator[int]:
    """Where the text of each token begins. Special tokens have a text where it was written out."""
    end = 0
    for token in texts:
        yield min(end + token.lead, len(text))
        for written in (token.text, token.special):
            if text.startswith(written, end):
                end += len(written)


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """What an answer shows of its prompt. ``echo``: its text, and with ``echo_top`` not None the
    log-probabilities, each with so many of the likeliest tokens. ``top`` not None: those of
    ``prompt_logprobs``."""

    echo: bool = False
    echo_top: int | None = None
    top: int | None = None

    @property
    def scored_top(self) -> int | None:
        """How many of the likeliest tokens the engine finds at each place; None: it scores none."""
        asked = [top for top in (self.echo_top if self.echo else None, self.top) if top is not None]
        return max(asked, default=None)

    @property
    def any(self) -> bool:
        """Whether anything is shown."""
        return self.echo or self.top is not None


@dataclass(slots=True)
class PromptScores:
    """The prompts of one response, completed by the events of its generation."""

    tokenizer: Tokenizer
    options: PromptOptions
    admitted: Admitted
    _scores: dict[int, list[PromptScore]] = field(default_factory=dict)
    _held: dict[int, Batch] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)

    async def events(self, batches: AsyncIterable[Batch]) -> AsyncIterator[Batch]:
        """The events of a generation, with the text of the prompt before the first one of each
        choice; those that come before its scores are held back."""
        async for batch in batches:
            shown: Batch = []
            for choice, event in batch:
                prompt = choice // self._n
                if isinstance(event, ScoreEvent):
                    self._scores.setdefault(prompt, []).extend(event.scores)
                    shown += self._shown(self._held.pop(prompt, []), prompt)
                elif self._is_complete(prompt):
                    shown += self._shown([(choice, event)], prompt)
                else:
                    self._held.setdefault(prompt, []).append((choice, event))
            if shown:
                yield shown

    def prompt_logprobs(self, choice: int) -> dict[str, Any]:
        """The field ``prompt_logprobs`` of a choice, where it is asked for."""
        top, prompt = self.options.top, choice // self._n
        if top is None:
            return {}
        positions = self._positions(prompt)
        ranks = [None if score is None else score.num_likelier + 1 for score in self._of(prompt)]
        tables = [
            None if rank is None else prompt_table(position, self.tokenizer, rank=rank, top=top)
            for position, rank in zip(positions, ranks, strict=True)
        ]
        return {"prompt_logprobs": tables}

    @property
    def _n(self) -> int:
        return self.admitted.requests[0].n

    def _is_complete(self, prompt: int) -> bool:
        request = self.admitted.requests[prompt]
        if request.scoring is None:
            return True
        expected = len(request.prompt) - request.scoring.start
        return len(self._scores.get(prompt, ())) >= expected

    def _shown(self, events: Batch, prompt: int) -> Batch:
        """``events`` of choices of a prompt, behind its echo."""
        if not self.options.echo:
            return events
        if not self._is_complete(prompt):
            self._held.setdefault(prompt, []).extend(events)
            return []
        shown: Batch = []
        length = len(self.admitted.texts[prompt].text)
        for choice, event in events:
            if choice not in self._begun:
                self._begun.add(choice)
                shown.append((choice, self._echo(prompt, choice)))
            shown.append(
                (choice, _moved(event, length) if isinstance(event, TokenEvent) else event)
            )
        return shown

    def _echo(self, prompt: int, choice: int) -> TokenEvent:
        positions: Sequence[PositionLogprobs] = ()
        top = self.options.echo_top
        if top is not None:
            positions = [replace(each, top=each.top[:top]) for each in self._positions(prompt)]
        return TokenEvent(choice, self.admitted.texts[prompt].text, (), tuple(positions))

    def _of(self, prompt: int) -> list[PromptScore | None]:
        """The score of each token that is shown."""
        scoring = self.admitted.requests[prompt].scoring
        start = 0 if scoring is None else scoring.start
        scores = self._scores.get(prompt, [])
        return [
            scores[token.place - start] if token.place >= start and scoring is not None else None
            for token in self.admitted.texts[prompt].tokens
        ]

    def _positions(self, prompt: int) -> list[PositionLogprobs]:
        return [
            PositionLogprobs(
                TokenLogprob(token.token_id, nan if score is None else score.logprob),
                () if score is None else score.top,
                token.previous,
                token.offset,
            )
            for token, score in zip(
                self.admitted.texts[prompt].tokens, self._of(prompt), strict=True
            )
        ]


def _moved(event: TokenEvent, by: int) -> TokenEvent:
    """The event behind an echo of ``by`` characters."""
    if not event.logprobs:
        return event
    logprobs = tuple(replace(each, offset=each.offset + by) for each in event.logprobs)
    return TokenEvent(event.index, event.text, event.token_ids, logprobs)
