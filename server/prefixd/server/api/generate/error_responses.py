"""How an end that is no answer reads to the caller: the engine's reason as one of our errors."""

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import storage_away
from prefixd.server.engine.request import FinishEvent, FinishReason, QueueFull
from prefixd.server.engine.step import STORAGE_UNAVAILABLE
from prefixd.server.errors import DeadlineExceeded, EngineFailure, PrefixdError, Unavailable

OVERLOADED = "overloaded"
_RETRY_AFTER_S = 1.0


def failure_of(event: FinishEvent, drain_state: DrainState) -> PrefixdError | None:
    """Why this sequence has no complete answer; None when it has."""
    match event.reason:
        case FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.ERROR if event.error_code == STORAGE_UNAVAILABLE:
            return storage_away(event.error or "the prefix store is unavailable")
        case FinishReason.ERROR:
            return EngineFailure(event.error or "the engine failed on this request")
        case FinishReason.TIMEOUT:
            return DeadlineExceeded(event.error or "the request's timeout has passed")
        case FinishReason.SHED:
            return Unavailable(
                event.error or "the server is too busy to begin this request",
                code=OVERLOADED,
                retry_after=event.retry_after or _RETRY_AFTER_S,
            )
        case FinishReason.ABORT:
            return drain_state.refusal("the server stopped before the answer was complete")


def refusal_of(full: QueueFull, drain_state: DrainState) -> PrefixdError:
    """Why the engine did not take a request."""
    if drain_state.closed:
        return drain_state.refusal("the server is shutting down")
    return Unavailable(full.message, code=OVERLOADED, retry_after=full.retry_after)
