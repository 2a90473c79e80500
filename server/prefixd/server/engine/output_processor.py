"""From sampled tokens to events for the caller: text is made final, and sequences end by it.

An exception of a detokenizer or of a caller's handler ends that one sequence, and is logged.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

from prefixd.server.engine.detokenizer import Detokenizer, ShownSpecials, TokenText
from prefixd.server.engine.inputs import PLACEHOLDER, num_rows_before
from prefixd.server.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    PositionLogprobs,
    ScoreEvent,
    TokenEvent,
    TokenLogprob,
)
from prefixd.server.engine.sequence import End, Sequence
from prefixd.server.engine.step import Chunk, Sampled, StepOutput
from prefixd.server.engine.stop_strings import StopStrings

log = logging.getLogger(__name__)

_UNDELIVERED = End(FinishReason.ERROR, error="the engine could not deliver this answer")


@dataclass(slots=True)
class LogprobQueue:
    """Log-probabilities of positions until their place in the text is final: a stop string that
    comes later may cut the text before them.

    ``num_characters`` counts the text of the tokens placed so far.
    """

    num_characters: int = 0
    _waiting: deque[PositionLogprobs] = field(default_factory=deque)
    _placed: deque[PositionLogprobs] = field(default_factory=deque)

    def add(self, sampled: Sampled, previous: int | None) -> None:
        """Add a position, if its log-probabilities are wanted."""
        if sampled.logprob is not None:
            token = TokenLogprob(sampled.token_id, sampled.logprob)
            self._waiting.append(PositionLogprobs(token, sampled.top_logprobs, previous, 0))

    def place(self, tokens: Items[TokenText]) -> None:
        """Place the oldest positions where the texts of these tokens begin."""
        for token in tokens:
            if self._waiting:
                offset = self.num_characters + token.lead
                self._placed.append(replace(self._waiting.popleft(), offset=offset))
            self.num_characters += len(token.text)

    def take(self, num_sent: int) -> tuple[PositionLogprobs, ...]:
        """Remove the positions that are final when ``num_sent`` characters have been sent."""
        final = []
        while self._placed and self._placed[0].offset <= num_sent:
            final.append(self._placed.popleft())
        return tuple(final)

    def take_rest(self, num_sent: int) -> tuple[PositionLogprobs, ...]:
        """Remove all positions; the text ended after ``num_sent`` characters."""
        rest = [
            replace(position, offset=min(position.offset, num_sent)) for position in self._placed
        ]
        rest += [replace(position, offset=num_sent) for position in self._waiting]
        self._placed.clear()
        self._waiting.clear()
        return tuple(rest)


@dataclass(slots=True)
class _Stream:
    """The output of one sequence to its caller. ``logprobs`` is None where they are not wanted;
    ``failed``: no more text can be delivered."""

    sequence: Sequence
    on_event: Callable[[Event], None]
    deliver: Callable[[], None] | None
    stop: StopStrings | None
    detokenizer: Detokenizer | None = None
    logprobs: LogprobQueue | None = None
    num_sent: int = 0
    failed: bool = False


class OutputProcessor:
    """Sequences that are not closed, and the streams to their callers."""

    def __init__(self, detokenizer: Callable[[Items[int]], Detokenizer]) -> None:
        """``detokenizer`` makes a new one from the prompt of each sequence, at its first token."""
        self._new_detokenizer = detokenizer
        self._by_request: dict[str, list[Sequence]] = {}
        self._streams: dict[int, _Stream] = {}
        self._undelivered: dict[Callable[[], None], None] = {}

    def open(
        self,
        sequences: Iterable[Sequence],
        on_event: Callable[[Event], None],
        deliver: Callable[[], None] | None = None,
    ) -> None:
        """Send the events of each of ``sequences`` to ``on_event`` until it is closed; ``deliver``
        is called after them, once for all streams that have the same."""
        for sequence in sequences:
            params = sequence.request.stop
            stop = None
            if params.strings:
                stop = StopStrings(params.strings, include=params.include_stop_string)
            stream = _Stream(sequence, on_event, deliver, stop)
            if sequence.request.sampling.top_logprobs is not None:
                stream.logprobs = LogprobQueue()
            self._streams[sequence.seq_id] = stream
            self._by_request.setdefault(sequence.request.request_id, []).append(sequence)

    def of(self, request_id: str) -> tuple[Sequence, ...]:
        """Sequences of a request that are not closed; none for an unknown id."""
        return tuple(self._by_request.get(request_id, ()))

    def all(self) -> list[Sequence]:
        """Every sequence that is not closed."""
        return [sequence for siblings in self._by_request.values() for sequence in siblings]

    def deliver(self) -> None:
        """Call ``deliver`` of the streams that had events since the last time."""
        undelivered, self._undelivered = self._undelivered, {}
        for deliver in undelivered:
            deliver()

    def push_scores(self, chunks: Iterable[Chunk], output: StepOutput) -> None:
        """Send the scores of prompt tokens that were not sent before, and remove the tokens of
        sequences whose scores are not finite. To be called before the tokens of the same step are
        pushed."""
        for chunk in chunks if output.scored else ():
            stream = self._streams.get(chunk.seq_id)
            if chunk.targets is None or stream is None:
                continue
            scores = output.scored[chunk.seq_id]
            if scores is None:
                output.sampled.pop(chunk.seq_id, None)
                continue
            place, new = stream.sequence.untaken(chunk, scores)
            if new:
                self._emit(stream, ScoreEvent(stream.sequence.index, place, tuple(new)))

    def push(self, sampled: dict[int, Items[Sampled]]) -> dict[int, End]:
        """Send the text that is final with these new tokens, by sequence id. Returns how sequences
        end by it, and removes the tokens after the one that ends theirs, and those of sequences
        that were closed since. Tokens of non-finite logits are skipped."""
        ends: dict[int, End] = {}
        for seq_id, tokens in sampled.items():
            stream = self._streams.get(seq_id)
            if stream is None:
                sampled[seq_id] = ()
                continue
            for index, token in enumerate(tokens):
                end = self._push(stream, token, index) if token.finite else None
                if end is not None:
                    ends[seq_id] = end
                    sampled[seq_id] = tokens[: index + 1]
                    break
        return ends

    def _push(self, stream: _Stream, token: Sampled, index: int) -> End | None:
        """Send the text that is final with one token, the ``index``-th new one of its sequence."""
        end = stream.sequence.end_after(token.token_id, num_before=index)
        try:
            stop = self._send(stream, token, end, index)
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(stream, error)
            return _UNDELIVERED
        return end if stop is None else End(FinishReason.STOP, stop=stop)

    def _send(
        self, stream: _Stream, sampled: Sampled, end: End | None, num_before: int
    ) -> str | None:
        """Send the event of one token, which may end its sequence. Returns the stop string that it
        completed."""
        sequence, token_id = stream.sequence, sampled.token_id
        detokenizer = stream.detokenizer
        if detokenizer is None:
            detokenizer = self._new_detokenizer(_text_of(sequence))
            if sequence.request.shown_special:
                detokenizer = ShownSpecials(detokenizer, sequence.request.shown_special)
            stream.detokenizer = detokenizer
        queue = stream.logprobs
        if queue is not None:
            queue.add(sampled, detokenizer.previous)
        tokens: Items[TokenText] = ()
        # A stop token is no part of the text, but a special one may be part of a stop string.
        if end is None or end.reason is not FinishReason.STOP or detokenizer.special(token_id):
            tokens = detokenizer.push(token_id)
        num_output = sequence.num_output + num_before
        text, stop = _final_text(
            stream, tokens, matches=num_output >= sequence.request.stop.min_tokens
        )
        stream.num_sent += len(text)
        logprobs = () if queue is None else queue.take(stream.num_sent)
        self._emit(stream, TokenEvent(sequence.index, text, (token_id,), logprobs))
        return stop

    def flush(self, sequence: Sequence, end: End) -> End:
        """Send the rest of the text of a sequence about to end. Returns its end: the text may
        complete a stop string, or fail to be delivered."""
        stream = self._streams[sequence.seq_id]
        if stream.detokenizer is None or stream.failed:
            return end
        try:
            text = ""
            if not isinstance(end.stop, str):
                text, stop = _final_text(stream, stream.detokenizer.flush(), matches=True)
                if stop is not None:
                    end = End(FinishReason.STOP, stop=stop)
                elif stream.stop is not None:
                    text += stream.stop.flush()
            stream.num_sent += len(text)
            queue = stream.logprobs
            logprobs = () if queue is None else queue.take_rest(stream.num_sent)
            if text or logprobs:
                self._emit(stream, TokenEvent(sequence.index, text, (), logprobs))
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(stream, error)
            return _UNDELIVERED
        return end

    def close(self, sequence: Sequence, *, retry_after: float | None) -> None:
        """Send the last event of a finished sequence, and forget it."""
        stream = self._streams.pop(sequence.seq_id)
        siblings = self._by_request[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.request_id]
        end, started = sequence.end, sequence.started
        assert end is not None
        event = FinishEvent(
            index=sequence.index,
            reason=end.reason,
            completion_tokens=sequence.num_output,
            stop=end.stop,
            error=end.error,
            error_code=end.error_code,
            cached_tokens=sum(map(_num_cached, sequence.rows)),
            queue_s=None if started is None else started - sequence.arrived,
            retry_after=retry_after,
            agreed=tuple(sequence.agreed),
        )
        try:
            self._emit(stream, event)
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(stream, error)

    def _emit(self, stream: _Stream, event: Event) -> None:
        stream.on_event(event)
        if stream.deliver is not None:
            self._undelivered[stream.deliver] = None


def _num_cached(sequence: Sequence) -> int:
    """Tokens of the prompt that were reused, without given embeddings."""
    return sequence.num_cached - num_rows_before(sequence.request.inputs, sequence.num_cached)


def _text_of(sequence: Sequence) -> Items[int]:
    """The prompt without given embeddings, which have no text."""
    request = sequence.request
    if not request.inputs:
        return request.prompt
    return [token for token in request.prompt if token != PLACEHOLDER]


def _final_text(
    stream: _Stream, tokens: Items[TokenText], *, matches: bool
) -> tuple[str, str | None]:
    """Text that is final with ``tokens``, and the stop string that ends it, where stop strings
    count (``matches``)."""
    if stream.logprobs is not None:
        stream.logprobs.place(tokens)
    strings, detokenizer = stream.stop, stream.detokenizer
    if strings is None or not matches:
        return "".join([token.text for token in tokens]), None
    assert detokenizer is not None
    text, stop = strings.push_tokens(tokens)
    if stop is None and strings.would_end(detokenizer.tentative(strings.reach)):
        rest = detokenizer.flush()  # the sequence ends here, so this text cannot change any more
        if stream.logprobs is not None:
            stream.logprobs.place(rest)
        ending, stop = strings.push_tokens(rest)
        text += ending
    return text, stop


def _fail(stream: _Stream, error: Exception) -> None:
    """Log the first failure of a stream; what is sent after it fails for the same reason."""
    if not stream.failed:
        request_id = stream.sequence.request.request_id
        log.error("an answer of request %s cannot be delivered", request_id, exc_info=error)
    stream.failed = True
