"""Run the model once before serving: does attention over blocks say what the model itself says?

A config tells much and not all. The check compares the logits of one text, run plainly with the
model's own eager attention, with the same text run as the server will: its head compiled as a
prefix, its tail copied, the rest in two chunks. A model that needs something else (alibi, a soft
cap, state-space layers) shows here, by name, at start.
"""

from dataclasses import dataclass

import torch

from prefixd.server.engine.request import PrefixKey, SamplingParams
from prefixd.server.engine.step import BlockCopy, Chunk, CompileChunk, Step
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.attention import IMPLEMENTATION
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.prefix import StagedTokens
from prefixd.server.model.runner import TorchRunner

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest relative error (L2) of the logits. In bfloat16 two right ways of running a model differ
by a tenth; a wrong position or a missing prefix differs by 1."""

_MARGIN = 1024.0
"""How far beyond what the base itself produces an uploaded value may lie."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of |x| for uploaded values: of a soft prompt's entries, of a KV prefix's."""

    max_abs_embedding: float
    max_abs_kv: float


@torch.inference_mode()
def self_check(base: LoadedBase, *, block_size: int) -> Limits:
    """Prove that the model can be served and measure what it produces, in a small pool of its own:
    the server's may have fewer blocks.

    Raises UnsupportedModel with the name of what went wrong.
    """
    size = block_size
    length = min(2 * size + 5, base.shape.max_positions - 1)
    runner = TorchRunner(base, num_blocks=-(-length // size) + 3, block_size=size)
    tokens = [(7919 * (i + 1)) % base.shape.vocab_size for i in range(length)]
    try:
        ours = _run_in_blocks(runner, tokens, prefix=size // 2 + 1)
    except (RuntimeError, TypeError, AttributeError) as error:  # a NotImplementedError too
        raise UnsupportedModel(f"{base.name} cannot be run over KV blocks: {error}") from error
    if runner.layers_seen != base.shape.num_layers:
        raise UnsupportedModel(
            f"{base.name} has {base.shape.num_layers} layers but {runner.layers_seen} attended "
            "through the attention interface; prefixd serves models whose layers all do"
        )
    plain = _run_plainly(runner, tokens)
    off = float((ours - plain).norm() / (plain - plain.mean()).norm())
    if not off <= _TOLERANCE[base.dtype]:
        raise UnsupportedModel(
            f"{base.name} gives other logits over KV blocks than by itself (relative error "
            f"{off:.2g}, at most {_TOLERANCE[base.dtype]:g} expected); it needs something that "
            "prefixd does not do"
        )
    pools = (*runner.cache.keys, *runner.cache.values)
    return Limits(
        max_abs_embedding=_MARGIN * float(base.module.get_input_embeddings().weight.abs().max()),
        max_abs_kv=_MARGIN * max(float(pool.abs().max()) for pool in pools),
    )


def _run_plainly(runner: TorchRunner, tokens: list[int]) -> torch.Tensor:
    module = runner.base.module
    module.set_attn_implementation("eager")
    try:
        ids = torch.tensor([tokens], device=runner.base.device)
        logits: torch.Tensor = module(input_ids=ids, use_cache=False).logits[0, -1]
        return logits.float()
    finally:
        module.set_attn_implementation(IMPLEMENTATION)


def _run_in_blocks(runner: TorchRunner, tokens: list[int], *, prefix: int) -> torch.Tensor:
    """Logits [vocab] of the last token, its first ``prefix`` tokens compiled as a prefix."""
    size = runner.cache.block_size
    head = StagedTokens(tuple(tokens[:prefix]))
    shared = list(range(1, 1 + -(-prefix // size)))
    whole = shared[: prefix // size]
    own = range(shared[-1] + 1, shared[-1] + 1 + -(-len(tokens) // size) - len(whole))
    table = [*whole, *own]
    compile_chunk = CompileChunk(PrefixKey("", ""), head, 0, prefix, shared)
    runner.run(Step(compiles=(compile_chunk,), fresh=(*shared, *own)))
    runner.cache.copy([BlockCopy(shared[-1], own[0])])
    middle = (prefix + len(tokens)) // 2
    runner.forward((Chunk(0, tokens[prefix:middle], prefix, table),))
    last = Chunk(0, tokens[middle:], middle, table, sampling=SamplingParams())
    return runner.forward((last,))[0].float()
