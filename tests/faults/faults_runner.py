"""A runner that injects faults around the real one.

A request is marked by its sampling seed, which greedy decoding ignores: its prompt and expected
output are those of a request without a fault.
"""

from collections import Counter, deque
from dataclasses import replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import Chunk, Step, StepOutput


class Fault(IntEnum):
    """The fault of a marked request. The first three are NaNs, the others exceptions."""

    NAN_PREFILL = 1  # the last chunk of the prompt: its KV and its logits
    NAN_LOGITS = 2  # one row of logits while decoding
    NAN_KV = 3  # KV of one decoded token; it causes NaN logits in the next step that is submitted
    RAISE = 4  # every step that carries the request
    RAISE_ONCE = 5  # the first step that carries it, after the pass
    MEMORY = 6  # the first step that carries it: out of memory


NANS = frozenset({Fault.NAN_PREFILL, Fault.NAN_LOGITS, Fault.NAN_KV})
EXCEPTIONS = frozenset(Fault) - NANS
_FAULT_STRIDE = 1_000_000


def marked(number: int, fault: Fault | None) -> int:
    """The seed of request ``number``, below a million."""
    return number + _FAULT_STRIDE * (fault or 0)


def _fault_of(seed: int | None) -> Fault | None:
    kind = 0 if seed is None else seed // _FAULT_STRIDE
    return Fault(kind) if kind else None


class _Marked(NamedTuple):
    """A row of a marked request: what of its sequence is known when its step is submitted."""

    chunk: Chunk
    fault: Fault
    seed: int
    decodes: bool

    @property
    def is_spoiled(self) -> bool:
        """Whether its step makes NaNs: each such step, since what a step behind a failed one has
        computed is dropped."""
        is_due = self.decodes is not (self.fault is Fault.NAN_PREFILL)
        return self.fault in NANS and self.chunk.sampling is not None and is_due


class FaultyRunner:
    """A ModelRunner that runs steps through ``inner``, and forwards all other attributes to it.

    ``fired`` counts faults by kind.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.engine: Engine | None = None  # set after the engine is created
        self.fired: Counter[Fault] = Counter()
        self._fired_seeds: set[int] = set()
        self._submitted: deque[list[_Marked]] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def submit(self, step: Step) -> None:
        """Submit one step, unless a fault of its marked requests comes before the pass."""
        assert self.engine is not None
        running = {each.seq_id: each for each in self.engine.core.scheduler.running}
        marked = []
        for chunk in step.chunks:
            sequence = running.get(chunk.seq_id)  # a probe has none
            seed = 0 if sequence is None else sequence.request.sampling.seed or 0
            fault = _fault_of(seed)
            if sequence is not None and fault is not None:
                prompt_end = sequence.num_prefix_tokens + sequence.num_prompt
                decodes = chunk.start + len(chunk.tokens) > prompt_end
                marked.append(_Marked(chunk, fault, seed, decodes))
        self._raise_before(marked)
        self.inner.submit(step)
        self._submitted.append(marked)
        if self.inner.depth:  # it has computed: the blocks may be another sequence's when it ends
            self._spoil_kv(marked)

    def collect(self) -> StepOutput:
        """Collect one step, with the faults that come after the pass."""
        marked = self._submitted.popleft()
        output: StepOutput = self.inner.collect()
        for row in marked:
            if row.fault is Fault.RAISE_ONCE and self._first(row.seed):
                self.fired[row.fault] += 1
                raise RuntimeError("injected after the pass")
        if not self.inner.depth:
            self._spoil_kv(marked)
        for row in marked:
            if row.is_spoiled:
                self.fired[row.fault] += 1
                if row.fault is not Fault.NAN_KV:
                    self._mark_not_finite(row.chunk, output)
        return output

    def _spoil_kv(self, marked: list[_Marked]) -> None:
        for row in marked:
            if row.is_spoiled and row.fault is not Fault.NAN_LOGITS:
                count = len(row.chunk.tokens) if row.fault is Fault.NAN_PREFILL else 1
                self._write_nan(row.chunk, count)

    def _raise_before(self, marked: list[_Marked]) -> None:
        if any(row.fault is Fault.RAISE for row in marked):
            self.fired[Fault.RAISE] += 1
            raise RuntimeError("injected before the pass")
        fresh = [row for row in marked if row.fault is Fault.MEMORY and self._first(row.seed)]
        if fresh:
            self.fired[Fault.MEMORY] += 1
            raise OutOfMemory("injected")

    @torch.inference_mode()
    def _write_nan(self, chunk: Chunk, count: int) -> None:
        """Write NaN into the KV of the last ``count`` positions that a chunk wrote."""
        decoder = self.inner.decoder
        end = chunk.start + len(chunk.tokens)
        written = decoder.read_kv(chunk.block_table, end)[:, end - count :]
        decoder.write_kv(chunk.block_table, end - count, torch.full_like(written, torch.nan))

    @staticmethod
    def _mark_not_finite(chunk: Chunk, output: StepOutput) -> None:
        first, *_ = output.sampled[chunk.seq_id]
        output.sampled[chunk.seq_id] = [replace(first, finite=False)]

    def _first(self, seed: int) -> bool:
        if seed in self._fired_seeds:
            return False
        self._fired_seeds.add(seed)
        return True
