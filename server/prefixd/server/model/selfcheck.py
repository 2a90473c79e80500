"""Run the model once before serving: attention over KV blocks must give the model's own logits.

The config does not show everything. The check compares the logits of one text under the model's
own eager attention with those of the same text run as the server runs it: the beginning compiled
as a prefix, its partial block copied, the rest in two chunks. A model that needs something else
(alibi, a soft cap, state-space layers) is rejected here, by name, at start.
"""

from dataclasses import dataclass

import torch

from prefixd.server.engine.request import PrefixKey, SamplingParams
from prefixd.server.engine.step import BlockCopy, Chunk, CompileChunk, Step
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.attention import IMPLEMENTATION
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.prefix import HardPrompt
from prefixd.server.model.runner import TorchRunner

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest relative error (L2) of the logits. In bfloat16 two correct ways of running a model differ
by 0.1; a wrong position or a missing prefix differs by 1."""

_MARGIN = 1024.0
"""An uploaded value may be this many times larger than the largest one of the base."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of |x| for uploaded values: of a soft prompt's entries, of a KV prefix's."""

    max_abs_embedding: float
    max_abs_kv: float


@torch.inference_mode()
def self_check(base: LoadedBase, *, block_size: int) -> Limits:
    """Check that the model can be served, and derive the bounds of uploaded values from it.

    Uses a small pool of its own, since the server's may have fewer blocks. Raises UnsupportedModel
    with the reason.
    """
    size = block_size
    length = min(2 * size + 5, base.shape.max_positions - 1)
    runner = TorchRunner(base, num_blocks=-(-length // size) + 3, block_size=size)
    tokens = [(7919 * (i + 1)) % base.shape.vocab_size for i in range(length)]
    try:
        ours = _run_in_blocks(runner, tokens, prefix=size // 2 + 1)
    except (RuntimeError, TypeError, AttributeError) as failure:  # includes NotImplementedError
        raise UnsupportedModel(f"{base.name} cannot be run over KV blocks: {failure}") from failure
    if runner.layers_seen != base.shape.num_layers:
        raise UnsupportedModel(
            f"{base.name} has {base.shape.num_layers} layers but {runner.layers_seen} used "
            "the attention interface; prefixd serves models whose layers all use it"
        )
    plain = _run_eager(runner, tokens)
    error = float((ours - plain).norm() / (plain - plain.mean()).norm())
    if not error <= _TOLERANCE[base.dtype]:
        raise UnsupportedModel(
            f"{base.name} gives other logits over KV blocks than by itself (relative error "
            f"{error:.2g}, expected at most {_TOLERANCE[base.dtype]:g}); it needs a feature that "
            "prefixd does not support"
        )
    pools = (*runner.cache.keys, *runner.cache.values)
    return Limits(
        max_abs_embedding=_MARGIN * float(base.module.get_input_embeddings().weight.abs().max()),
        max_abs_kv=_MARGIN * max(float(pool.abs().max()) for pool in pools),
    )


def _run_eager(runner: TorchRunner, tokens: list[int]) -> torch.Tensor:
    module = runner.base.module
    module.set_attn_implementation("eager")
    try:
        ids = torch.tensor([tokens], device=runner.base.device)
        logits: torch.Tensor = module(input_ids=ids, use_cache=False).logits[0, -1]
        return logits.float()
    finally:
        module.set_attn_implementation(IMPLEMENTATION)


def _run_in_blocks(runner: TorchRunner, tokens: list[int], *, prefix: int) -> torch.Tensor:
    """Logits [vocab] of the last token, with the first ``prefix`` tokens compiled as a prefix."""
    size = runner.cache.block_size
    head = HardPrompt(tuple(tokens[:prefix]))
    shared = list(range(1, 1 + -(-prefix // size)))
    full = shared[: prefix // size]
    own = range(shared[-1] + 1, shared[-1] + 1 + -(-len(tokens) // size) - len(full))
    table = [*full, *own]
    compile_chunk = CompileChunk(PrefixKey("", ""), head, 0, prefix, shared)
    runner.run(Step(compiles=[compile_chunk], fresh=[*shared, *own]))
    runner.cache.copy([BlockCopy(shared[-1], own[0])])
    middle = (prefix + len(tokens)) // 2
    runner.forward((Chunk(0, tokens[prefix:middle], prefix, table),))
    last = Chunk(0, tokens[middle:], middle, table, sampling=SamplingParams())
    return runner.forward((last,))[0].float()
