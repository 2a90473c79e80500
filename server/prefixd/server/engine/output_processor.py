"""The way back: sampled tokens become events for the caller, and text is made final.

Whatever a detokenizer or a caller's handler raises ends that one sequence, and is logged.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prefixd.server.engine.request import Event, FinishEvent, FinishReason, TokenEvent, TokenLogprob
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Detokenizer, Sampled
from prefixd.server.engine.stopping import StopStrings

log = logging.getLogger(__name__)

_UNDELIVERED = "the engine could not deliver this answer"


@dataclass(frozen=True, slots=True)
class Ending:
    """How its own text ended a sequence: by a stop string, or by a failure on the way back."""

    reason: FinishReason
    stop: str | None = None
    error: str | None = None


@dataclass(slots=True)
class _Reply:
    """The way back from one sequence to its caller. ``failed``: it can take no more text."""

    on_event: Callable[[Event], None]
    stop: StopStrings
    detokenizer: Detokenizer | None = None
    failed: bool = False


class OutputProcessor:
    """Living sequences by request, and what is still to be said of them."""

    def __init__(self, detokenizer: Callable[[], Detokenizer]) -> None:
        """``detokenizer`` makes a fresh one for each sequence, at its first token."""
        self._detokenizer = detokenizer
        self._by_request: dict[str, list[Sequence]] = {}
        self._replies: dict[int, _Reply] = {}

    def open(self, sequences: Iterable[Sequence], on_event: Callable[[Event], None]) -> None:
        """Begin: ``on_event`` hears of each of ``sequences`` until its end."""
        for sequence in sequences:
            asked = sequence.request.stop
            stop = StopStrings(asked.strings, include=asked.include_stop_string)
            self._replies[sequence.seq_id] = _Reply(on_event, stop)
            self._by_request.setdefault(sequence.request.request_id, []).append(sequence)

    def of(self, request_id: str) -> tuple[Sequence, ...]:
        """Sequences of a request that are not closed; none for an unknown id."""
        return tuple(self._by_request.get(request_id, ()))

    def all(self) -> list[Sequence]:
        """Every sequence that is not closed."""
        return [sequence for siblings in self._by_request.values() for sequence in siblings]

    def token(self, sequence: Sequence, sampled: Sampled) -> Ending | None:
        """Pass a token on: text that is final goes out. Returns the end it came to by that."""
        reply = self._replies[sequence.seq_id]
        try:
            stop = self._pass_on(reply, sequence, sampled)
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(reply, sequence, error)
            return Ending(FinishReason.ERROR, error=_UNDELIVERED)
        return None if stop is None else Ending(FinishReason.STOP, stop=stop)

    def _pass_on(self, reply: _Reply, sequence: Sequence, sampled: Sampled) -> str | None:
        """Returns the stop string that the token completed."""
        if reply.detokenizer is None:
            reply.detokenizer = self._detokenizer()
        text = reply.detokenizer.push(sampled.token_id)
        stop = None
        if sequence.num_output > sequence.request.stop.min_tokens:
            text, stop = reply.stop.push(text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampled.logprob is not None:
            logprobs = (TokenLogprob(sampled.token_id, sampled.logprob),)
        reply.on_event(
            TokenEvent(
                index=sequence.index,
                text=text,
                token_ids=(sampled.token_id,),
                logprobs=logprobs,
                top_logprobs=(sampled.top_logprobs,) if logprobs else (),
            )
        )
        return stop

    def close(self, sequence: Sequence, *, retry_after: float | None = None) -> None:
        """Send the last of the text and the end, and forget the sequence."""
        reply = self._replies.pop(sequence.seq_id)
        siblings = self._by_request[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request[sequence.request.request_id]
        try:
            _flush(reply, sequence)
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(reply, sequence, error)
            sequence.correct(FinishReason.ERROR, error=_UNDELIVERED)
        try:
            reply.on_event(_end_of(sequence, retry_after))
        except Exception as error:  # noqa: BLE001 - logged there
            _fail(reply, sequence, error)


def _flush(reply: _Reply, sequence: Sequence) -> None:
    if reply.detokenizer is None or reply.failed or isinstance(sequence.stop, str):
        return
    text, stop = reply.stop.push(reply.detokenizer.flush())
    if stop is not None:
        sequence.correct(FinishReason.STOP, stop=stop)
    else:
        text += reply.stop.flush()
    if text:
        reply.on_event(TokenEvent(index=sequence.index, text=text, token_ids=()))


def _end_of(sequence: Sequence, retry_after: float | None) -> FinishEvent:
    assert sequence.reason is not None
    queued = None if sequence.started is None else sequence.started - sequence.arrived
    return FinishEvent(
        index=sequence.index,
        reason=sequence.reason,
        completion_tokens=sequence.num_output,
        stop=sequence.stop,
        error=sequence.error,
        error_code=sequence.error_code,
        cached_tokens=sequence.num_cached,
        queue_s=queued,
        retry_after=retry_after if sequence.reason is FinishReason.SHED else None,
    )


def _fail(reply: _Reply, sequence: Sequence, error: Exception) -> None:
    """Once is enough: a handler that fails will fail at what is still said to it."""
    if not reply.failed:
        request_id = sequence.request.request_id
        log.error("an answer of request %s cannot be delivered", request_id, exc_info=error)
    reply.failed = True
