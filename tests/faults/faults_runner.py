"""A runner that injects faults around the real one.

A request is marked by its sampling seed, which greedy decoding ignores: its prompt and expected
output are those of a request without a fault.
"""

from collections import Counter
from dataclasses import replace
from enum import IntEnum
from typing import Any

import torch

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.step import Chunk, OutOfMemory, Step, StepOutput
from prefixd.server.model.runner import Runner


class Fault(IntEnum):
    """The fault of a marked request. The first three are NaNs, the others exceptions."""

    NAN_PREFILL = 1  # the last chunk of the prompt: its KV and its logits
    NAN_LOGITS = 2  # one row of logits while decoding
    NAN_KV = 3  # KV of one decoded token; it causes NaN logits one step later
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


class FaultyRunner(BlockingRunner):
    """Runs steps through ``inner``, and forwards all other attributes to it.

    ``fired`` counts faults by kind.
    """

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.engine: Engine | None = None  # set after the engine is created
        self.fired: Counter[Fault] = Counter()
        self._fired_seeds: set[int] = set()

    @property
    def _scheduler(self) -> Scheduler:
        assert self.engine is not None
        return self.engine.core.scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> StepOutput:
        """Run one step, with the faults of its marked requests."""
        seeds = {s.seq_id: s.request.sampling.seed or 0 for s in self._scheduler.running}
        faults = {
            chunk.seq_id: (chunk, fault)
            for chunk in step.chunks
            if (fault := _fault_of(seeds.get(chunk.seq_id))) is not None  # a probe has no seed
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
                self._write_nan(chunk, len(chunk.tokens))
                self._mark_not_finite(chunk, output)
                self.fired[fault] += 1
        elif decodes and self._first(seed):
            if fault is Fault.NAN_LOGITS:
                self._mark_not_finite(chunk, output)
            else:
                self._write_nan(chunk, 1)
            self.fired[fault] += 1

    def _prompt_end(self, chunk: Chunk) -> int:
        sequence = next(s for s in self._scheduler.running if s.seq_id == chunk.seq_id)
        return sequence.num_prefix_tokens + sequence.num_prompt

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
