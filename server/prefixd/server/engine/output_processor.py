"""From sampled tokens to events for the caller: text is made final, and sequences end by it.

An exception of a detokenizer or of a caller's handler ends that one sequence, and is logged.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from prefixd.server.engine.request import Event, FinishEvent, FinishReason, TokenEvent, TokenLogprob
from prefixd.server.engine.sequence import End, Sequence
from prefixd.server.engine.step import Detokenizer, Sampled

log = logging.getLogger(__name__)

_UNDELIVERED = End(FinishReason.ERROR, error="the engine could not deliver this answer")


@dataclass(slots=True)
class StopStrings:
    """Watches a growing text for the first of several strings.

    Text that could still become a stop string is held back, so that no part of one is sent.
    """

    strings: tuple[str, ...]
    include: bool = False
    _held: str = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns the text that is final now, and the stop string that ended it."""
        self._held += text
        matches = [(self._held.find(s), len(s), s) for s in self.strings if s in self._held]
        if matches:
            start, length, string = min(matches)
            final = self._held[: start + length if self.include else start]
            self._held = ""
            return final, string
        split = len(self._held) - self._num_held_back()
        final, self._held = self._held[:split], self._held[split:]
        return final, None

    def flush(self) -> str:
        """The text held back, when no stop string came after all."""
        text, self._held = self._held, ""
        return text

    def _num_held_back(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max((len(s) for s in self.strings), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self.strings):
                return size
        return 0


@dataclass(slots=True)
class _Stream:
    """The output of one sequence to its caller. ``failed``: no more text can be delivered."""

    sequence: Sequence
    on_event: Callable[[Event], None]
    stop: StopStrings | None
    detokenizer: Detokenizer | None = None
    failed: bool = False


class OutputProcessor:
    """Sequences that are not closed, and the streams to their callers."""

    def __init__(self, detokenizer: Callable[[], Detokenizer]) -> None:
        """``detokenizer`` makes a new one for each sequence, at its first token."""
        self._new_detokenizer = detokenizer
        self._by_request: dict[str, list[Sequence]] = {}
        self._streams: dict[int, _Stream] = {}

    def open(self, sequences: Iterable[Sequence], on_event: Callable[[Event], None]) -> None:
        """Send the events of each of ``sequences`` to ``on_event`` until it is closed."""
        for sequence in sequences:
            params = sequence.request.stop
            stop = None
            if params.strings:
                stop = StopStrings(params.strings, include=params.include_stop_string)
            self._streams[sequence.seq_id] = _Stream(sequence, on_event, stop)
            self._by_request.setdefault(sequence.request.request_id, []).append(sequence)

    def of(self, request_id: str) -> tuple[Sequence, ...]:
        """Sequences of a request that are not closed; none for an unknown id."""
        return tuple(self._by_request.get(request_id, ()))

    def all(self) -> list[Sequence]:
        """Every sequence that is not closed."""
        return [sequence for siblings in self._by_request.values() for sequence in siblings]

    def push(self, sampled: Mapping[int, Sampled]) -> dict[int, End]:
        """Send the text that is final with these new tokens, by sequence id. Returns how sequences
        end by it. Tokens of non-finite logits are skipped."""
        ends: dict[int, End] = {}
        for seq_id, token in sampled.items():
            stream = self._streams[seq_id]
            if not token.finite:
                continue
            end = stream.sequence.end_after(token.token_id)
            if end is None or end.reason is not FinishReason.STOP:  # no text for a stop token
                try:
                    stop = self._send(stream, token)
                except Exception as error:  # noqa: BLE001 - logged there
                    _fail(stream, error)
                    end = _UNDELIVERED
                else:
                    end = end if stop is None else End(FinishReason.STOP, stop=stop)
            if end is not None:
                ends[seq_id] = end
        return ends

    def _send(self, stream: _Stream, sampled: Sampled) -> str | None:
        """Send the event of one token. Returns the stop string that it completed."""
        if stream.detokenizer is None:
            stream.detokenizer = self._new_detokenizer()
        sequence, stop = stream.sequence, None
        text = stream.detokenizer.push(sampled.token_id)
        if stream.stop is not None and sequence.num_output >= sequence.request.stop.min_tokens:
            text, stop = stream.stop.push(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob),)
        stream.on_event(
            TokenEvent(
                index=sequence.index,
                text=text,
                token_ids=(sampled.token_id,),
                logprobs=logprobs,
                top_logprobs=(sampled.top_logprobs,) if logprobs else (),
            )
        )
        return stop

    def flush(self, sequence: Sequence, end: End) -> End:
        """Send the rest of the text of a sequence about to end. Returns its end: the text may
        complete a stop string, or fail to be delivered."""
        stream = self._streams[sequence.seq_id]
        if stream.detokenizer is None or stream.failed or isinstance(end.stop, str):
            return end
        try:
            text = stream.detokenizer.flush()
            if stream.stop is not None:
                text, stop = stream.stop.push(text)
                if stop is None:
                    text += stream.stop.flush()
                else:
                    end = End(FinishReason.STOP, stop=stop)
            if text:
                stream.on_event(TokenEvent(index=sequence.index, text=text, token_ids=()))
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
            cached_tokens=sequence.num_cached,
            queue_s=None if started is None else started - sequence.arrived,
            retry_after=retry_after,
        )
        try:
            stream.on_event(event)
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(stream, error)


def _fail(stream: _Stream, error: Exception) -> None:
    """Log the first failure of a stream; what is sent after it fails for the same reason."""
    if not stream.failed:
        request_id = stream.sequence.request.request_id
        log.error("an answer of request %s cannot be delivered", request_id, exc_info=error)
    stream.failed = True
