"""The way back: sampled tokens become events for the caller, and text is made final."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.request import Event, FinishEvent, FinishReason, TokenEvent, TokenLogprob
from server.engine.sequence import Sequence
from server.engine.step import Detokenizer, Sampled
from server.engine.stopping import StopStrings

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Reply:
    """The way back from one sequence to its caller."""

    on_event: Callable[[Event], None]
    detokenizer: Detokenizer
    stop: StopStrings


class Replies:
    """Living sequences by request, and what is still to be said of them."""

    def __init__(self, detokenizer: Callable[[], Detokenizer]) -> None:
        """``detokenizer`` makes a fresh one for each sequence."""
        self._detokenizer = detokenizer
        self._by_request: dict[str, list[Sequence]] = {}
        self._replies: dict[int, _Reply] = {}

    def open(self, sequence: Sequence, on_event: Callable[[Event], None]) -> None:
        """Begin: ``on_event`` hears of ``sequence`` until its end."""
        asked = sequence.request.stop
        stop = StopStrings(asked.strings, include=asked.include_stop_string)
        self._replies[sequence.seq_id] = _Reply(on_event, self._detokenizer(), stop)
        self._by_request.setdefault(sequence.request.request_id, []).append(sequence)

    def of(self, request_id: str) -> tuple[Sequence, ...]:
        """Sequences of a request that are not closed; none for an unknown id."""
        return tuple(self._by_request.get(request_id, ()))

    def all(self) -> list[Sequence]:
        """Every sequence that is not closed."""
        return [sequence for siblings in self._by_request.values() for sequence in siblings]

    def token(self, sequence: Sequence, sampled: Sampled) -> str | None:
        """Pass a token on: text that is final goes out. Returns the stop string it completed."""
        reply = self._replies[sequence.seq_id]
        text = reply.detokenizer.push(sampled.token_id)
        stop = None
        if sequence.num_output > sequence.request.stop.min_tokens:
            text, stop = reply.stop.push(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob),)
        event = TokenEvent(
            index=sequence.index,
            text=text,
            token_ids=(sampled.token_id,),
            logprobs=logprobs,
            top_logprobs=(sampled.top_logprobs,) if logprobs else (),
        )
        _send(reply, event)
        return stop

    def close(self, sequence: Sequence, *, retry_after: float | None = None) -> None:
        """Send the last of the text and the end, and forget the sequence."""
        reply = self._replies.pop(sequence.seq_id)
        siblings = self._by_request[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.request_id]
        if not isinstance(sequence.stop, str):
            _flush(reply, sequence)
        assert sequence.reason is not None
        queued = None if sequence.started is None else sequence.started - sequence.arrived
        _send(
            reply,
            FinishEvent(
                index=sequence.index,
                reason=sequence.reason,
                completion_tokens=sequence.num_output,
                stop=sequence.stop,
                error=sequence.error,
                cached_tokens=sequence.num_cached,
                queue_s=queued,
                retry_after=retry_after if sequence.reason is FinishReason.SHED else None,
            ),
        )


def _flush(reply: _Reply, sequence: Sequence) -> None:
    text, stop = reply.stop.push(reply.detokenizer.flush())
    if stop is not None:
        sequence.reason, sequence.stop = FinishReason.STOP, stop
    else:
        text += reply.stop.flush()
    if text:
        _send(reply, TokenEvent(index=sequence.index, text=text, token_ids=()))


def _send(reply: _Reply, event: Event) -> None:
    try:
        reply.on_event(event)
    except Exception:
        log.exception("a caller's event handler failed; the engine goes on")
