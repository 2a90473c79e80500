"""Prefixes of other tools get the tokens that transformers generates from their own tensors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from prefixd.client.convert.sources import read_source, write_folder
from prefixd.server.engine.request import PrefixHandle
from tests.clients.foreign_files import (
    PrefixEncoder,
    save_cartridge,
    save_encoder,
    save_kobold,
    words,
)
from tests.golden.golden_harness import (
    Adapter,
    Served,
    make_adapter,
    peft_configs,
    prompts,
    serve,
    tiny_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS, COUNT = 7, 12
LAYERS, KV_HEADS, HEAD_DIM, HIDDEN = 3, 2, 16, 64
WIDTH = LAYERS * 2 * KV_HEADS * HEAD_DIM
TASK = 1

Generate = Callable[[Any, list[int]], list[int]]
"""``generate(model, prompt)``: the reference."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[Served]:
    engine = serve(model)
    yield engine
    engine.engine.stop()


def from_past(keys: torch.Tensor, values: torch.Tensor) -> Generate:
    """Generation over keys and values, [layers, KV heads, tokens, head_dim]."""

    def generate(model: Any, prompt: list[int]) -> list[int]:
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(keys[layer : layer + 1].float(), values[layer : layer + 1].float(), layer)
        ids = torch.tensor([[0] * TOKENS + prompt])  # the first TOKENS are in the cache
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    return generate


def from_embeddings(embeddings: torch.Tensor) -> Generate:
    """Generation from embeddings of virtual tokens, [tokens, hidden], before the prompt's."""

    def generate(model: Any, prompt: list[int]) -> list[int]:
        own = model.get_input_embeddings()(torch.tensor([prompt]))
        inputs = torch.cat([embeddings[None].float(), own], dim=1)
        out = model.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            max_new_tokens=COUNT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = out[0].tolist()
        return tokens

    return generate


def from_flat(flat: torch.Tensor) -> Generate:
    """P-tuning v2's own ``get_prompt``: [tokens, layers * 2 * KV width] as keys and values."""
    past = flat.view(TOKENS, LAYERS * 2, KV_HEADS, HEAD_DIM).permute(1, 2, 0, 3).split(2)
    return from_past(torch.stack([kv[0] for kv in past]), torch.stack([kv[1] for kv in past]))


def cartridge(folder: Path, *, frozen: int = 2, word: str = "frozen", half: bool = False) -> Any:
    keys, values = torch.randn(2, LAYERS, KV_HEADS, TOKENS, HEAD_DIM)
    if half:
        keys, values = keys.bfloat16(), values.bfloat16()
    save_cartridge(folder / "cache-step9.pt", keys, values, frozen=frozen, word=word)
    return from_past(keys, values), None


def p_tuning_v2(folder: Path, *, hidden: int | None, lead: str) -> Any:
    encoder = PrefixEncoder(tokens=TOKENS, width=WIDTH, hidden=hidden).requires_grad_(
        requires_grad=False
    )
    for weight in encoder.parameters():
        weight.data.mul_(3.0 if hidden else 1.0)
    others = {"transformer.word_embeddings.weight": torch.zeros(4, 4)} if lead else {}
    save_encoder(folder / "pytorch_model.bin", encoder, lead=lead, others=others)
    return from_flat(encoder()), None


def tgis(folder: Path) -> Any:
    prompt = torch.nn.Parameter(torch.randn(TOKENS, HIDDEN))
    torch.save(prompt, folder / "decoder.pt")
    return from_embeddings(prompt.detach()), None


def tensorrt(folder: Path, *, half: bool) -> Any:
    table = torch.randn(3, TOKENS + 2, HIDDEN).to(torch.bfloat16 if half else torch.float16)
    table[TASK, TOKENS:] = 0  # shorter than the others
    np.save(folder / "table.npy", words(table) if half else table.numpy())
    return from_embeddings(table[TASK, :TOKENS]), TASK


def kobold(folder: Path, *, half: bool) -> Any:
    prompt = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16 if half else torch.float32)
    save_kobold(folder / "prompt.zip", words(prompt) if half else prompt.numpy())
    return from_embeddings(prompt), None


FORMATS: dict[str, Callable[[Path], Any]] = {
    "cartridge": cartridge,
    "cartridge-fixed": lambda folder: cartridge(folder, word="fixed"),
    "cartridge-bfloat16": lambda folder: cartridge(folder, frozen=0, half=True),
    "p-tuning-v2": lambda folder: p_tuning_v2(folder, hidden=None, lead="prefix_encoder."),
    "p-tuning-v2-trans": lambda folder: p_tuning_v2(
        folder, hidden=24, lead="transformer.prefix_encoder."
    ),
    "p-tuning-v2-bare": lambda folder: p_tuning_v2(folder, hidden=24, lead=""),
    "tgis": tgis,
    "tensorrt-float16": lambda folder: tensorrt(folder, half=False),
    "tensorrt-bfloat16": lambda folder: tensorrt(folder, half=True),
    "kobold": lambda folder: kobold(folder, half=False),
    "kobold-bfloat16": lambda folder: kobold(folder, half=True),
}


def converted(served: Served, source: Path, folder: Path, *, task_id: int | None) -> PrefixHandle:
    prefix = read_source(str(source), task_id=task_id)
    assert prefix is not None
    write_folder(prefix, folder)
    return served.add(Adapter(None, folder, prefix.task_id))


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_equal_those_of_transformers(
    name: str, served: Served, model: Any, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    source = tmp_path / "source"
    source.mkdir()
    generate, task_id = FORMATS[name](source)
    prefix = converted(served, source, tmp_path / "converted", task_id=task_id)
    assert prefix.num_tokens == TOKENS
    for prompt in prompts(4, seed=5):
        expected = generate(model, prompt)
        assert served.generate(prompt, prefix, count=COUNT) == expected
        assert served.generate(prompt, count=COUNT) != expected, "the prefix changes nothing"


@pytest.mark.parametrize("peft_type", peft_configs(1))
def test_tokens_of_a_pickled_adapter_equal_those_of_peft(
    peft_type: str, served: Served, model: Any, tmp_path: Path
) -> None:
    adapter = make_adapter(model, peft_type, TOKENS, tmp_path / "safe")
    adapter.model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not list(tmp_path.glob("pickled/*.safetensors"))
    prefix = converted(
        served, tmp_path / "pickled", tmp_path / "converted", task_id=adapter.task_id
    )
    for prompt in prompts(4, seed=6):
        expected = adapter.generate(prompt, COUNT)
        assert served.generate(prompt, prefix, count=COUNT) == expected
