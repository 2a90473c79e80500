"""The life of a sequence: one table, and everything that moves along it.

::

    WAITING --admit--> RUNNING --finish--> FINISHED
       ^                  |
       +-----preempt------+          abort and failure reach FINISHED from anywhere before it
"""

import hashlib
import heapq
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum, auto
from math import inf

from prefixd.server.engine.inputs import check_runs
from prefixd.server.engine.lookup import Lookup
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    PrefixHandle,
    PromptScore,
)
from prefixd.server.engine.step import Chunk, GatedRows, Targets


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


@dataclass(frozen=True, slots=True)
class End:
    """How a sequence ended. The fields are those of ``FinishEvent``."""

    reason: FinishReason
    stop: str | int | None = None
    error: str | None = None
    error_code: str | None = None


@dataclass(eq=False, slots=True)
class Sequence:
    """One request's tokens and state; a request with ``n=4`` has four.

    ``tokens`` is prompt then output. ``num_computed`` counts the tokens whose KV is in the pool
    once the steps in flight have run, virtual tokens not included, and ``num_pending`` those that
    these steps sample and that are not in ``tokens`` yet; while ``verifies`` a draft it is not
    known how many. ``block_table`` begins with the shared blocks of the prefix; ``side_blocks`` are
    its own besides, of its state and then those that its request asked for. ``gated`` is set while
    it runs under a gated prefix.
    ``num_cached`` tokens were reused at the first start, ``num_remembered`` own blocks are
    registered for reuse, ``num_yields`` times it was preempted for another tenant. ``end`` is set
    once, by ``finish``. ``lookup`` proposes its next tokens (None: it was not needed yet), while it
    ``speculates``. ``next_target`` is the place of the next prompt token to be scored whose score
    has not come, None where there is none.
    ``ensemble`` are all rows of its ensemble, the leader first (without one: none). They are in the
    same state at any time; the leader alone is queued, has events and knows the ``members`` of the
    request. ``agreed`` is the leader's, as in ``FinishEvent``.

    Times are in seconds on the engine's clock: ``arrived``, ``started`` (first run; None before)
    and ``due_since`` (since when only its prefix was missing).
    """

    seq_id: int
    request: AdmittedRequest
    index: int
    seed: int
    tokens: list[int]
    state: State = State.WAITING
    num_computed: int = 0
    num_pending: int = 0
    verifies: bool = False
    block_table: list[int] = field(default_factory=list)
    side_blocks: list[int] = field(default_factory=list)
    gated: GatedRows | None = None
    arrived: float = 0.0
    due_since: float | None = None
    started: float | None = None
    num_cached: int = 0
    num_remembered: int = 0
    num_yields: int = 0
    block_names: list[bytes] = field(default_factory=list)
    lookup: Lookup | None = None
    end: End | None = None
    ensemble: "tuple[Sequence, ...]" = ()
    agreed: list[int] = field(default_factory=list)
    # Copied from the request, because every step reads them.
    tenant: str = field(init=False)
    background: bool = field(init=False)
    prefix: PrefixHandle | None = field(init=False)
    num_prefix_tokens: int = field(init=False)
    num_prompt: int = field(init=False)
    cost: int = field(init=False)
    speculates: bool = field(init=False)
    next_target: int | None = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.tenant, self.prefix, self.cost = request.tenant, request.prefix, cost_of(request)
        self.background = request.background
        self.num_prefix_tokens = 0 if request.prefix is None else request.prefix.num_positions
        self.num_prompt = len(request.prompt)
        self.speculates = request.speculate and request.constraint is None
        # The sequences of a request have the same prompt: the first is scored.
        scoring = request.scoring if self.index == 0 else None
        self.next_target = None if scoring is None else self._target_from(scoring.start)
        if request.inputs:
            check_runs(request.inputs, request.prompt)

    @property
    def leader(self) -> "Sequence":
        """The first row of its ensemble; itself without one."""
        return self.ensemble[0] if self.ensemble else self

    @property
    def rows(self) -> "tuple[Sequence, ...]":
        """All rows of its ensemble; itself alone without one."""
        return self.ensemble or (self,)

    @property
    def num_attended(self) -> int:
        """Rows of its prefix that its tokens attend to: in its positions, or gated."""
        return self.num_prefix_tokens if self.gated is None else self.gated.num_tokens

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_blocks(self) -> int:
        """Blocks that it holds, shared ones and side blocks included."""
        return len(self.block_table) + len(self.side_blocks)

    @property
    def num_remaining(self) -> int:
        """Tokens, pending ones included, that no step has computed yet; 1 while decoding."""
        return len(self.tokens) + self.num_pending - self.num_computed

    @property
    def is_complete(self) -> bool:
        """Whether it ends, at the latest, with the tokens pending."""
        num_output = len(self.tokens) + self.num_pending - self.num_prompt
        return num_output >= self.request.stop.max_tokens

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.state is State.FINISHED

    @property
    def reason(self) -> FinishReason | None:
        """Why it ended; None while it lives."""
        return None if self.end is None else self.end.reason

    def admit(self, *, num_computed: int, now: float) -> None:
        """WAITING to RUNNING, with the KV of its first ``num_computed`` tokens in the pool."""
        self._move(State.RUNNING)
        self.num_computed = num_computed
        self.due_since = None
        if self.started is None:
            self.started, self.num_cached = now, num_computed

    def preempt(self) -> None:
        """RUNNING back to WAITING: its KV is dropped and will be recomputed. A token that is
        pending still comes."""
        self._move(State.WAITING)
        self.num_computed = self.num_remembered = 0

    def discard_pending(self) -> None:
        """The steps in flight failed: what they sample does not come."""
        self.num_pending, self.verifies = 0, False

    def finish(self, end: End) -> None:
        """Any living state to FINISHED."""
        self._move(State.FINISHED)
        self.end = end

    def end_after(self, token_id: int, *, num_before: int = 0) -> End | None:
        """How ``token_id`` as the next token ends the sequence; None: it goes on. ``num_before``
        new tokens come before it and have not been added yet."""
        stop = self.request.stop
        num_output = len(self.tokens) - self.num_prompt + num_before + 1
        if token_id in stop.token_ids and num_output > stop.min_tokens:
            return End(FinishReason.STOP, stop=token_id)
        return End(FinishReason.LENGTH) if num_output >= stop.max_tokens else None

    def targets(self, start: int, size: int) -> Targets | None:
        """What is scored where the ``size`` tokens from ``start`` on are computed."""
        scoring = self.request.scoring
        if self.next_target is None or scoring is None:
            return None
        first, stop = max(self.next_target, start + 1), min(start + size + 1, self.num_prompt)
        if first >= stop:
            return None
        return Targets(first - start - 1, self.tokens[first:stop], scoring.top)

    def untaken(self, chunk: Chunk, scores: Items[PromptScore]) -> tuple[int, Items[PromptScore]]:
        """The place of the first of ``scores`` that was not taken, and those from there on: a
        preempted sequence may compute some twice."""
        assert chunk.targets is not None
        place = chunk.start - self.num_prefix_tokens + chunk.targets.offset + 1
        first = place + len(scores) if self.next_target is None else max(place, self.next_target)
        return first, scores[first - place :]

    def take_scores(self, stop: int) -> None:
        """The scores of the prompt tokens before ``stop`` have come."""
        if self.next_target is not None and stop > self.next_target:
            self.next_target = self._target_from(stop)

    def _target_from(self, place: int) -> int | None:
        return place if place < self.num_prompt else None

    def _move(self, state: State) -> None:
        assert state in _NEXT[self.state], f"a sequence cannot go from {self.state} to {state}"
        self.state = state

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.tenant}, {self.state.name.lower()}, "
            f"{self.num_computed}/{len(self.tokens)} tokens, {self.num_blocks} blocks)"
        )


def cost_of(request: AdmittedRequest) -> int:
    """Tokens that each output of ``request`` adds to the queue: prompt and output, of each row."""
    expected = request.expected_tokens
    num_output = request.stop.max_tokens if expected is None else expected
    return request.num_prompt_tokens + request.num_rows * num_output


def sequences_of(request: AdmittedRequest, *, first_id: int, seed: int) -> list[Sequence]:
    """The ``n`` sequences of ``request``, with consecutive seeds; of an ensemble the leaders. The
    ids of all rows are consecutive."""
    requests, sequences = request.of_rows(), []
    for index in range(request.n):
        rows = tuple(
            Sequence(
                seq_id=first_id + index * len(requests) + place,
                request=own,
                index=index,
                seed=seed + index,
                tokens=list(own.prompt),
            )
            for place, own in enumerate(requests)
        )
        if len(rows) > 1:
            for row in rows:
                row.ensemble, row.speculates = rows, False
            rows[0].agreed = [0] * len(rows)
        sequences.append(rows[0])
    return sequences


def seeded_uniform(seed: int, index: int) -> float:
    """The draw in [0, 1) for output ``index`` under ``seed``: the same in any batch, after a
    preemption and on any device."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


_MIN_COMPACTED = 256
"""Deadlines below which the heap is never compacted."""


class Deadlines:
    """When requests time out, and when unstarted ones have waited too long, earliest first.

    ``next_at`` is the earliest deadline; infinity when there is none.
    """

    def __init__(self) -> None:
        self.next_at = inf
        self._heap: list[tuple[float, int, FinishReason, Sequence]] = []
        self._max_entries = _MIN_COMPACTED

    def add(self, sequence: Sequence, *, max_queue_wait_s: float | None) -> None:
        """Add the deadlines of a sequence that has just arrived, if it has any."""
        for limit_s, reason in (
            (sequence.request.timeout_s, FinishReason.TIMEOUT),
            (max_queue_wait_s, FinishReason.SHED),
        ):
            if limit_s is not None:
                deadline = sequence.arrived + limit_s
                heapq.heappush(self._heap, (deadline, sequence.seq_id, reason, sequence))
        if len(self._heap) > self._max_entries:
            # A sequence that ended in time would otherwise be kept, with all its tokens, until a
            # deadline that may be years away.
            self._heap = [item for item in self._heap if not item[-1].finished]
            heapq.heapify(self._heap)
            self._max_entries = max(_MIN_COMPACTED, 2 * len(self._heap))
        self.next_at = self._heap[0][0] if self._heap else inf

    def expired(self, *, now: float) -> Iterator[tuple[Sequence, End]]:
        """Living sequences to end now, and how. The caller ends each before it takes the next."""
        while self.next_at <= now:
            _, _, reason, sequence = heapq.heappop(self._heap)
            self.next_at = self._heap[0][0] if self._heap else inf
            if sequence.finished:
                continue
            if reason is FinishReason.TIMEOUT:
                error = (
                    f"the request's timeout of {sequence.request.timeout_s:g} s passed after "
                    f"{sequence.num_output} tokens of output"
                )
                yield sequence, End(reason, error=error)
            elif sequence.started is None:
                waited = now - sequence.arrived
                error = f"the server is full: the request waited {waited:.0f} s without a start"
                yield sequence, End(reason, error=error)
