"""A runner that fails on purpose, around the real one.

A request is marked by its sampling seed, which greedy decoding never looks at: the prompt and the
right answer stay those of an honest request.
"""

from collections import Counter
from dataclasses import replace
from enum import IntEnum
from typing import Any

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.step import Chunk, OutOfMemory, Step, StepOutput
from prefixd.server.model.runner import TorchRunner


class Fault(IntEnum):
    """What is wrong with a marked request. The first three are NaNs, the others exceptions."""

    NAN_PREFILL = 1  # the last chunk of the prompt: its KV and its logits
    NAN_LOGITS = 2  # one row of logits while decoding
    NAN_KV = 3  # KV of one decoded token; the model itself makes NaN logits of it, a step later
    RAISE = 4  # every step that carries the request
    RAISE_ONCE = 5  # the first one, after the pass was run
    MEMORY = 6  # the first one: out of memory


NANS = frozenset({Fault.NAN_PREFILL, Fault.NAN_LOGITS, Fault.NAN_KV})
EXCEPTIONS = frozenset(Fault) - NANS
_FAULT_STRIDE = 1_000_000


def marked(number: int, fault: Fault | None) -> int:
    """The seed of request ``number``, below a million."""
    return number + _FAULT_STRIDE * (fault or 0)


def _fault_of(seed: int | None) -> Fault | None:
    kind = 0 if seed is None else seed // _FAULT_STRIDE
    return Fault(kind) if kind else None


class FaultyRunner:
    """Runs steps through ``inner``; what else the engine asks of a runner goes there too.

    ``fired`` counts faults by kind.
    """

    def __init__(self, inner: TorchRunner) -> None:
        self.inner = inner
        self.engine: Engine | None = None  # set once there is one
        self.fired: Counter[Fault] = Counter()
        self._done: set[int] = set()

    @property
    def _scheduler(self) -> Scheduler:
        assert self.engine is not None
        return self.engine.loop.scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> StepOutput:
        """One step, with whatever the marks in it ask for."""
        seeds = {s.seq_id: s.request.sampling.seed or 0 for s in self._scheduler.running}
        faults = {
            chunk.seq_id: (chunk, fault)
            for chunk in step.chunks
            if (fault := _fault_of(seeds[chunk.seq_id])) is not None
        }
        self._raise_before(step, seeds, [fault for _, fault in faults.values()])
        output = self.inner.run(step)
        for seq_id, (_, fault) in faults.items():
            if fault is Fault.RAISE_ONCE and self._first(seeds[seq_id]):
                self.fired[fault] += 1
                raise RuntimeError("injected after the pass")
        for seq_id, (chunk, fault) in faults.items():
            if chunk.sampling is not None and fault in NANS:
                self._poison(chunk, fault, seeds[seq_id], output)
        return output

    def _raise_before(self, step: Step, seeds: dict[int, int], faults: list[Fault]) -> None:
        if Fault.RAISE in faults:
            self.fired[Fault.RAISE] += 1
            raise RuntimeError("injected before the pass")
        if Fault.MEMORY in faults:
            fresh = {
                seed
                for chunk in step.chunks
                if _fault_of(seed := seeds[chunk.seq_id]) is Fault.MEMORY and self._first(seed)
            }
            if fresh:
                self.fired[Fault.MEMORY] += 1
                raise OutOfMemory("injected")

    def _poison(self, chunk: Chunk, fault: Fault, seed: int, output: StepOutput) -> None:
        decodes = chunk.start + len(chunk.tokens) > self._prompt_end(chunk)
        if fault is Fault.NAN_PREFILL:
            if not decodes and self._first(seed):
                self._spoil(chunk, len(chunk.tokens))
                self._no_number(chunk, output)
                self.fired[fault] += 1
        elif decodes and self._first(seed):
            if fault is Fault.NAN_LOGITS:
                self._no_number(chunk, output)
            else:
                self._spoil(chunk, 1)
            self.fired[fault] += 1

    def _prompt_end(self, chunk: Chunk) -> int:
        sequence = next(s for s in self._scheduler.running if s.seq_id == chunk.seq_id)
        return sequence.num_prefix_tokens + sequence.num_prompt

    def _spoil(self, chunk: Chunk, count: int) -> None:
        """NaN into the KV of the last ``count`` positions of a chunk: what it wrote itself."""
        cache = self.inner.cache
        end = chunk.start + len(chunk.tokens)
        for position in range(end - count, end):
            block = chunk.block_table[position // cache.block_size]
            slot = block * cache.block_size + position % cache.block_size
            for pool in (*cache.keys, *cache.values):
                pool[slot] = float("nan")

    @staticmethod
    def _no_number(chunk: Chunk, output: StepOutput) -> None:
        output.sampled[chunk.seq_id] = replace(output.sampled[chunk.seq_id], finite=False)

    def _first(self, seed: int) -> bool:
        if seed in self._done:
            return False
        self._done.add(seed)
        return True
