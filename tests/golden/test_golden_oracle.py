"""A prefix made from the KV of real tokens gives the logits of the full text.

This oracle needs no PEFT and compares logits, which is stricter than comparing tokens.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefixd.server.engine.request import PrefixKey, SamplingParams
from prefixd.server.engine.step import BlockCopy, Chunk, CompileChunk, Step
from prefixd.server.model.batch import lay_out
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.prefix import Prefix, prefix_of
from prefixd.server.model.runner import Runner
from prefixd.store.artifact.artifact import pack_peft, read_artifact
from tests.golden.golden_harness import DEVICE, prompts, spec_of, tiny_configs, tiny_model

LENGTHS = (1, 15, 16, 17, 37)


def kv_of_real_tokens(model: torch.nn.Module, tokens: list[int], folder: Path) -> Path:
    """Save the KV that ``model`` computes for ``tokens`` as a PEFT prefix-tuning adapter."""
    with torch.no_grad():
        cache = model(
            input_ids=torch.tensor([tokens], device=DEVICE), use_cache=True
        ).past_key_values
    halves = [half[0] for layer in cache.layers for half in (layer.keys, layer.values)]
    # [2 * layers, kv_heads, P, head_dim] -> [P, 2 * layers * kv_heads * head_dim]
    stacked = torch.stack(halves).permute(2, 0, 1, 3).reshape(len(tokens), -1).cpu().contiguous()
    folder.mkdir()
    save_file({"prompt_embeddings": stacked}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": len(tokens),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, base: LoadedBase) -> Prefix:
    target = folder / "artifact"
    config = (folder / "adapter_config.json").read_bytes()
    pack_peft(config, folder / "adapter_model.safetensors", target, task_id=None)
    return prefix_of(read_artifact(target, base=spec_of(base), count_tokens=len), base, None)


def logits_under(runner: Runner, prefix: Prefix, rest: list[int], block_size: int) -> torch.Tensor:
    """Logits [len(rest), vocab] after each of ``rest``, with one token in each pass."""
    length = prefix.num_tokens
    shared = list(range(1, 1 + -(-length // block_size)))
    full_blocks = shared[: length // block_size]
    own = list(range(100, 100 + -(-(length + len(rest)) // block_size) - len(full_blocks)))
    compiled = CompileChunk(PrefixKey("t", "d"), prefix, 0, length, shared)
    runner.run(Step(compiles=[compiled], fresh=[*shared, *own]))
    if len(full_blocks) < len(shared):
        runner.run(Step(copies=[BlockCopy(shared[-1], own[0])]))
    table = [*full_blocks, *own]
    rows = []
    for i, token in enumerate(rest):
        chunk = Chunk(0, [token], length + i, table, sampling=SamplingParams())
        rows.append(runner.decoder.forward(lay_out([chunk])).values[0])
    return torch.stack(rows)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("architecture", list(tiny_configs()))
def test_a_prefix_from_the_kv_of_real_tokens_gives_the_logits_of_the_full_text(
    architecture: str, length: int, tmp_path: Path
) -> None:
    model = tiny_model(architecture)
    text = [t for p in prompts(6, seed=length) for t in p][: length + 12]
    folder = kv_of_real_tokens(model, text[:length], tmp_path / "adapter")
    with torch.no_grad():
        full = model(input_ids=torch.tensor([text], device=DEVICE), use_cache=False).logits[
            0, length:
        ]

    base = prepare_base(model, None, name=architecture, dtype="float32", device=DEVICE)
    runner = Runner(ModuleDecoder(base, num_blocks=128, block_size=16))
    in_blocks = logits_under(runner, read(folder, base), text[length:], 16)
    assert (in_blocks - full).abs().max() <= 1e-4
    assert full.abs().max() > 1, "logits this small would pass any tolerance"
