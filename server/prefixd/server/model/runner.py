"""The only code that runs on the device: takes a step, returns sampled tokens."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import torch

from prefixd.server.engine.prefix_source import StagedPrefix
from prefixd.server.engine.request import PrefixKey, PromptScore
from prefixd.server.engine.runner import BlockingRunner, OutOfMemory
from prefixd.server.engine.step import CompileChunk, Step, StepOutput
from prefixd.server.model.batch import lay_out
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.ensembles import sample_all
from prefixd.server.model.gated import gated_kv
from prefixd.server.model.prefix import AdaptionPrompt, KVPrefix, Stack
from prefixd.server.model.scorer import score, scored_chunks, unpack
from prefixd.server.model.thread_control import ThreadControl
from prefixd.server.model.torch_decoder import TorchDecoder

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "error: out of memory",  # the CUDA runtime and driver; newer torch raises AcceleratorError
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class Runner(BlockingRunner):
    """Runs steps on a decoder. Not thread-safe."""

    def __init__(self, decoder: Decoder, *, threads: ThreadControl | None = None) -> None:
        """``threads`` sets how many compute each step (None: it is not set)."""
        self.decoder = decoder
        self._threads = threads
        self._num_threads = 0

    def run(self, step: Step) -> StepOutput:
        """Run one forward pass over the step's chunks and compiles. Raises OutOfMemory."""
        if self._threads is None:
            return self._run_or_raise(step)
        num_threads = self._threads.before_step()
        if num_threads != self._num_threads:
            self.decoder.set_threads(num_threads)
            self._num_threads = num_threads
        output = self._run_or_raise(step)
        counted = self._threads.after_step()
        return replace(output, thread_use=self.decoder.thread_use() or counted)

    def _run_or_raise(self, step: Step) -> StepOutput:
        with out_of_memory(self.decoder.device):
            return self._run(step)

    @torch.inference_mode()
    def _run(self, step: Step) -> StepOutput:
        # Before the pass, which has all cores: a thread that took one from it would delay it by
        # more. Masks are computed while the host reports the last tokens and plans the step.
        step.join_masks()
        saved, forwarded = write_pool(self.decoder, step)
        if not step.chunks and not forwarded:
            return StepOutput({}, saved)
        logits = self.decoder.forward(lay_out(step.chunks, forwarded))
        sampled = [chunk for chunk in step.chunks if chunk.sampling is not None]
        scored: Mapping[int, Sequence[PromptScore] | None] = {}
        if to_score := scored_chunks(step.chunks):
            num_sampled = len(sampled) + step.num_drafts
            scored = unpack(score(logits.values[num_sampled:], to_score), to_score)
            logits = logits.first(num_sampled)
        if not sampled:
            return StepOutput({}, saved, scored=scored)
        tokens = iter(sample_all(logits, [each for chunk in sampled for each in chunk.positions()]))
        new = [(chunk, list(islice(tokens, 1 + chunk.num_drafts))) for chunk in sampled]
        by_id = {chunk.seq_id: chunk.verified(each) for chunk, each in new if chunk.is_sampled}
        return StepOutput(by_id, saved, scored=scored)


def write_pool(
    decoder: Decoder, step: Step
) -> tuple[dict[PrefixKey, StagedPrefix], list[CompileChunk]]:
    """Do what a step asks of the pool before its pass: saves, zeroed blocks, copies and KV
    prefixes. Returns the saved prefixes and the compiles that need the pass."""
    saved: dict[PrefixKey, StagedPrefix] = {
        save.key: KVPrefix(
            decoder.read_kv(save.block_table, save.num_tokens),
            _with_states(decoder).cache.read_blocks(save.side_blocks) if save.side_blocks else (),
            save.gated_from,
        )
        for save in step.saves
    }
    decoder.zero(step.fresh)
    decoder.copy(step.copies)
    forwarded = []
    for part in step.compiles:
        if isinstance(part.payload, KVPrefix):
            kv = part.payload.kv[:, part.start : part.stop]
            decoder.write_kv(part.block_table, part.start, kv)
            if part.payload.side:
                states = part.payload.side
                _with_states(decoder).cache.write_blocks(part.side_blocks, states)
        elif isinstance(part.payload, AdaptionPrompt):
            kv = gated_kv(
                part.payload,
                part.start,
                part.stop,
                num_layers=decoder.num_layers,
                project=decoder.project,
            )
            decoder.write_kv(part.block_table, part.start, kv)
        elif isinstance(part.payload, Stack):
            forwarded += _write_front(decoder, part, part.payload)
        else:
            forwarded.append(part)
    return saved, forwarded


def _write_front(decoder: Decoder, part: CompileChunk, stack: Stack) -> list[CompileChunk]:
    """Write the rows of a KV prefix in front of a stack; what is left of ``part`` for the pass,
    which attends to them."""
    front = stack.parts[0]
    if not isinstance(front, KVPrefix) or part.start >= front.num_tokens:
        return [part]
    stop = min(part.stop, front.num_tokens)
    decoder.write_kv(part.block_table, part.start, front.kv[:, part.start : stop])
    return [] if stop == part.stop else [replace(part, start=stop)]


def _with_states(decoder: Decoder) -> TorchDecoder:
    assert isinstance(decoder, TorchDecoder), f"{decoder.name} keeps no states"
    return decoder


@contextmanager
def out_of_memory(device: torch.device) -> Iterator[None]:
    """Raise OutOfMemory for errors of the block that mean it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(str(error).partition("\n")[0]) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Only torch's device allocator raises a class of its own; other errors differ by message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in _OUT_OF_MEMORY)
