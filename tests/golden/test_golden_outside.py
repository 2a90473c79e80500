"""Families outside transformers' attention interface give PEFT's tokens, mixed and preempted."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefixd.server.engine.request import PrefixHandle
from tests.golden.golden_harness import Served, make_adapter, plain_generate, prompts
from tests.golden.test_golden_mixed import preempt_often, together
from tests.model.outside_models import outside_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 12
VIRTUAL_TOKENS = 29
KV_HEADS = {"falcon": 1, "falcon, ALiBi and one KV head": 1}
"""Where PEFT would take another number from the config, or none."""


def generates(model: Any, before: list[int]) -> Callable[[list[int]], list[int]]:
    return lambda prompt: plain_generate(model, [*before, *prompt], COUNT)


def compare(served: Served, model: Any, name: str, folder: Path) -> None:
    """Twelve requests in one pass: base, text, soft prompt and KV prefix, against PEFT."""
    text = prompts(2, seed=4, vocab=97)[1]
    cases: list[tuple[PrefixHandle | None, Callable[[list[int]], list[int]]]] = [
        (None, generates(model, [])),
        (served.add_tokens(text), generates(model, text)),
    ]
    heads = KV_HEADS.get(name, model.config.num_attention_heads)
    width = model.config.hidden_size // model.config.num_attention_heads
    for kind, sizes in (
        ("PROMPT_TUNING", {}),
        ("PREFIX_TUNING", {"token_dim": heads * width}),
    ):
        adapter = make_adapter(
            model, kind, VIRTUAL_TOKENS, folder / kind, num_attention_heads=heads, **sizes
        )
        cases.append((served.add(adapter), partial(adapter.generate, count=COUNT)))
    requests = [
        (prompt, *cases[index % len(cases)])
        for index, prompt in enumerate(prompts(12, seed=6, vocab=97))
    ]
    expected = [generate(prompt) for prompt, _, generate in requests]
    under_prefixes = [
        tokens == plain_generate(model, prompt, COUNT)
        for tokens, (prompt, handle, _) in zip(expected[:4], requests, strict=False)
        if handle
    ]
    assert not all(under_prefixes)
    assert together(served, [(prompt, handle) for prompt, handle, _ in requests], COUNT) == expected


def test_bloom_gives_the_tokens_of_peft_alone_and_mixed(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = outside_model("bloom")
    served = serving(model, max_prefill_chunk=7, block_size=4, num_blocks=110)
    preempt_often(served)
    compare(served, model, "bloom", tmp_path)
    assert served.stats().preemptions >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("falcon", 64),
        ("falcon, ALiBi", 7),
        ("falcon, ALiBi and one KV head", 64),
        ("falcon, new architecture", 7),
        ("gpt_neo", 64),
        ("mpt, 3 heads", 1),
    ],
)
def test_variants_of_families_give_the_tokens_of_peft(
    name: str, chunk: int, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = outside_model(name)
    compare(serving(model, max_prefill_chunk=chunk), model, name, tmp_path)
