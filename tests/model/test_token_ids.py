"""Bases whose tokenizer, embeddings and logits have different sizes."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Step
from prefixd.server.model.decoder import Logits
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.runner import Runner
from prefixd.server.model.sampler import sample

EMBEDDINGS = 32
GREEDY = SamplingParams(temperature=0)


def base_with(num_logits: int) -> LoadedBase:
    """A base of 32 embeddings whose head has ``num_logits`` rows, the last ones the largest."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=EMBEDDINGS,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(16, num_logits, bias=False)
    model.lm_head.weight.data[-4:] *= 100
    return prepare_base(model, None, name="tiny", dtype="float32", device="cpu")


def generate(runner: Runner, prompt: list[int], count: int, **more: Any) -> list[int]:
    """Sampled tokens, each fed in again."""
    tokens = list(prompt)
    for _ in range(count):
        chunk = Chunk(0, tokens, 0, [1, 2, 3], sampling=GREEDY, **more)
        tokens.append(runner.run(Step(chunks=[chunk], fresh=[1, 2, 3])).sampled[0][0].token_id)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("head", "num_logits"), [(40, 32), (32, 32), (24, 24)])
def test_only_ids_with_an_embedding_and_a_logit_are_sampled(head: int, num_logits: int) -> None:
    base = base_with(head)
    assert (base.num_embeddings, base.num_logits) == (EMBEDDINGS, num_logits)
    runner = Runner(ModuleDecoder(base, num_blocks=4, block_size=4))
    sampled = [generate(runner, [token], 4) for token in range(EMBEDDINGS)]
    assert all(token < num_logits for tokens in sampled for token in tokens)


def test_prompt_ids_without_a_logit_are_penalised_without_an_error() -> None:
    logits = Logits(torch.tensor([[1.0, 3.0, 2.0]]))
    penalty = SamplingParams(temperature=0, repetition_penalty=2.0)
    chunk = Chunk(0, [1], 0, [1], sampling=penalty, history=(1, 7, 3), num_prompt_tokens=3)
    assert sample(logits, [chunk])[0].token_id == 2


@pytest.mark.parametrize("banned", [(500,), (-1,), (500, 1)])
def test_banned_ids_without_a_logit_are_ignored(banned: tuple[int, ...]) -> None:
    logits = Logits(torch.tensor([[1.0, 2.0, 3.0]]))
    assert sample(logits, [Chunk(0, [1], 0, [1], sampling=GREEDY, banned=banned)])[0].token_id == 2
