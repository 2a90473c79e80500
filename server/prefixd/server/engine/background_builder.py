"""The background parts of a step, planned when all of its foreground is.

Next to the foreground they get the tokens that ``background_share`` allows, and without it the
whole step. What has started and gets no room in a step waits in place, with its blocks. A step
without any row of the foreground, although some run, gets none either: they wait for a mask or a
token, and would wait for this step too.
"""

from collections.abc import Callable

from prefixd.server.engine.background import Background
from prefixd.server.engine.background_share import BackgroundShare
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.memory import Memory
from prefixd.server.engine.prefix_loader import PrefixLoader
from prefixd.server.engine.recovery import Recovery
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.speculation import Speculation
from prefixd.server.engine.step import Step
from prefixd.server.engine.step_budget import StepBudget
from prefixd.server.engine.step_builder import StepBuilder, num_source

_LOOKAHEAD = 32
"""Waiting sequences without a ready prefix that one step visits."""


class BackgroundBuilder:
    """Adds background parts to steps. ``share`` measures what they cost."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        background: Background,
        waiting: FairQueue,
        running: list[Sequence],
        builder: StepBuilder,
        memory: Memory,
        prefix_loader: PrefixLoader,
        recovery: Recovery,
        step_budget: StepBudget,
        speculation: Speculation,
        holds: Callable[[Sequence], bool],
    ) -> None:
        """``waiting`` and ``running`` are those of the foreground; the rest as for the others."""
        self.share = BackgroundShare()
        self._config = config
        self._background = background
        self._waiting = waiting
        self._running = running
        self._builder = builder
        self._memory = memory
        self._prefix_loader = prefix_loader
        self._backoff = recovery.backoff
        self._step_budget = step_budget
        self._speculation = speculation
        self._holds = holds
        self._saved = 0

    def add_parts(self, step: Step, *, now: float) -> None:
        """Add what of the background class runs in ``step``."""
        is_alone = not step.num_parts
        if is_alone and self._running:
            return
        if is_alone:  # the limit so far is that of prompts
            step.budget, step.max_chunk = self._config.max_tokens_per_step, self._backoff.max_chunk
        else:
            step.limit(self.share.tokens(step))
        first, num_before = len(step.chunks), step.num_tokens
        decoding = self._builder.continue_decodes(step, self._next_decodes(step))
        if is_alone:
            # A request that arrives waits for this step as for one with streams.
            limit = self._step_budget.prompt_tokens(num_decoding=max(1, len(decoding)))
            if limit is not None:
                step.limit(limit)
        for sequence in self._background.running:
            if self._num_places(step) and sequence.num_remaining > 1 and not self._holds(sequence):
                self._builder.run(step, sequence)
        if step.budget and not self._is_foreground_waiting():
            self._serve_waiting(step, now)
        self._prefix_loader.compile_for_background(step)
        step.background_tokens = step.num_tokens - num_before
        if len(step.chunks) > first or step.background_tokens:
            step.num_foreground = first
        if is_alone:
            self._speculation.add_drafts(step, decoding)

    def _num_places(self, step: Step) -> int:
        """Rows and tokens that ``step`` still has room for."""
        return min(step.budget, self._backoff.max_running - len(step.chunks))

    def _next_decodes(self, step: Step) -> list[Sequence]:
        """The running sequences that decode in ``step``, oldest first: where it has no room for
        all, those of the tenants that were served least."""
        count = self._num_places(step)
        decoding = [
            sequence
            for sequence in self._background.running
            if sequence.num_remaining == 1 and not (sequence.num_pending and sequence.is_complete)
        ]
        if count <= 0 or len(decoding) <= count:
            return decoding[: max(0, count)]
        counter = self._background.waiting.counter
        chosen = set(sorted(decoding, key=lambda sequence: counter(sequence.tenant))[:count])
        return [sequence for sequence in decoding if sequence in chosen]

    def _is_foreground_waiting(self) -> bool:
        """Whether the foreground waits for something that the class could take: a start, or room
        for a prefix."""
        if self._prefix_loader.wants_room:
            return True
        return self._waiting.has_runnable(self._memory.residency.ready)

    def _serve_waiting(self, step: Step, now: float) -> None:
        """Start sequences in fair order, and load the prefixes of the others. One that has waited
        too long for its prefix lets only those start behind it that are the first under theirs:
        when the rest has ended there is room for it."""
        background, residency = self._background, self._memory.residency
        room = max(0, min(self._num_places(step), self._backoff.max_running - self._num_running))
        ready = tuple(residency.background_ready) if room else ()
        is_draining, passed_over = False, set[str]()
        lookahead = _LOOKAHEAD if room else 0
        for sequence in background.waiting.in_order(ready=ready, depth=room, lookahead=lookahead):
            if sequence.num_pending:
                continue
            if not self._memory.is_ready(sequence):
                is_overdue = self._is_overdue(sequence, now)
                forces = is_overdue and not (self._waiting.num_sequences or self._num_running)
                self._prefix_loader.load_for_background(step, sequence, forces=forces)
                is_draining |= is_overdue
                passed_over.add(sequence.tenant)
                continue
            if is_draining and not self._memory.is_first_use(sequence):
                continue
            if self._num_running >= self._backoff.max_running or not self._num_places(step):
                break
            if self._holds(sequence):
                continue
            budget = step.budget
            if sequence.request.source and not self._has_saved(step, num_source(sequence)):
                break
            level = background.waiting.counter(sequence.tenant)
            if not self._builder.start(step, sequence, now):
                step.budget = min(step.budget, budget)
                break
            for tenant in passed_over - {sequence.tenant}:
                background.waiting.lift(tenant, level)

    def _has_saved(self, step: Step, num_tokens: int) -> bool:
        """Whether an encoder may run over ``num_tokens`` in ``step``, in one pass as it has to. It
        may when as much was left of the last shares together: the budget is raised by it then."""
        if step.budget >= num_tokens:
            return True
        self._saved += step.budget
        if self._saved < num_tokens:
            return False
        self._saved = 0
        step.limit(step.budget)
        step.budget += num_tokens
        return True

    @property
    def _num_running(self) -> int:
        return len(self._running) + len(self._background.running)

    def _is_overdue(self, sequence: Sequence, now: float) -> bool:
        if sequence.due_since is None:
            sequence.due_since = now
        return now - sequence.due_since > self._config.max_prefix_wait_s
