"""The life of a sequence: one table, and everything that moves along it.

::

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^                  |
       +-----preempt------+          abort and failure reach FINISHED from anywhere before it
"""

from dataclasses import dataclass, field
from enum import Enum, auto

from prefixd.server.engine.request import AdmittedRequest, FinishReason, PrefixHandle, StopParams


class State(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


_NEXT = {
    State.WAITING: {State.RUNNING, State.FINISHED},
    State.RUNNING: {State.WAITING, State.FINISHED},
    State.FINISHED: set[State](),
}


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's tokens and state; ``n=4`` makes four of them.

    ``tokens`` is prompt then output. ``num_computed`` counts the tokens whose KV is in the pool,
    virtual tokens not included. ``block_table`` begins with the shared blocks of the prefix.

    Times are in seconds on the engine's clock: ``arrived``, ``started`` (first run; None before)
    and ``due_since`` (since when nothing but its prefix was missing). A ``suspect`` was in a step
    that failed and has to prove itself alone.
    """

    seq_id: int
    request: AdmittedRequest
    index: int
    seed: int
    tokens: list[int]
    state: State = State.WAITING
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    arrived: float = 0.0
    due_since: float | None = None
    started: float | None = None
    suspect: bool = False
    num_cached: int = 0
    num_remembered: int = 0
    block_names: list[bytes] = field(default_factory=list)
    reason: FinishReason | None = None
    stop: str | int | None = None
    error: str | None = None
    error_code: str | None = None

    @property
    def tenant(self) -> str:
        """Owner of the request."""
        return self.request.tenant

    @property
    def prefix(self) -> PrefixHandle | None:
        """The prefix it runs under, if any."""
        return self.request.prefix

    @property
    def num_prefix_tokens(self) -> int:
        """Positions before the first real token."""
        return self.request.prefix.num_tokens if self.request.prefix else 0

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Tokens known but not yet in the pool; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def finished(self) -> bool:
        """Whether its life is over."""
        return self.state is State.FINISHED

    def admit(self, *, num_computed: int, now: float) -> None:
        """WAITING to RUNNING, with the KV of its first ``num_computed`` tokens at hand."""
        self._move(State.RUNNING)
        self.num_computed = num_computed
        self.due_since = None
        if self.started is None:
            self.started, self.num_cached = now, num_computed

    def preempt(self) -> None:
        """RUNNING back to WAITING: its KV is dropped and will be recomputed."""
        self._move(State.WAITING)
        self.num_computed = self.num_remembered = 0

    def finish(
        self,
        reason: FinishReason,
        *,
        stop: str | int | None = None,
        error: str | None = None,
        error_code: str | None = None,
    ) -> None:
        """Any living state to FINISHED."""
        self._move(State.FINISHED)
        self.reason, self.stop, self.error, self.error_code = reason, stop, error, error_code

    def correct(
        self,
        reason: FinishReason,
        *,
        stop: str | int | None = None,
        error: str | None = None,
    ) -> None:
        """Say otherwise how it ended: its last text decides."""
        assert self.finished
        self.reason, self.stop, self.error = reason, stop, error

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token and say whether it ends the sequence (without ending it)."""
        self.tokens.append(token_id)
        stop: StopParams = self.request.stop
        if token_id in stop.token_ids and self.num_output > stop.min_tokens:
            return FinishReason.STOP
        if self.num_output >= stop.max_tokens:
            return FinishReason.LENGTH
        return None

    def _move(self, state: State) -> None:
        assert state in _NEXT[self.state], f"a sequence cannot go from {self.state} to {state}"
        self.state = state

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.tenant}, {self.state.name.lower()}, "
            f"{self.num_computed}/{len(self.tokens)} tokens, {len(self.block_table)} blocks)"
        )


def sequences_of(request: AdmittedRequest, *, first_id: int, seed: int) -> list[Sequence]:
    """The ``n`` sequences that ``request`` asks for, with ids and seeds that follow each other."""
    return [
        Sequence(
            seq_id=first_id + index,
            request=request,
            index=index,
            seed=seed + index,
            tokens=list(request.prompt),
        )
        for index in range(request.n)
    ]
