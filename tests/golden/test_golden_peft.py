"""Greedy float32 tokens equal PEFT's, for every PEFT type and architecture."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden.golden_harness import (
    Served,
    make_adapter,
    narrow_config,
    peft_configs,
    plain_generate,
    prompts,
    random_model,
    tiny_configs,
    tiny_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 16


@pytest.mark.parametrize("peft_type", list(peft_configs(1)))
@pytest.mark.parametrize("architecture", list(tiny_configs()))
def test_greedy_tokens_under_a_prefix_equal_those_of_peft(
    architecture: str, peft_type: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    served = serving(model)
    changed = 0
    for length in (1, 16, 21):
        adapter = make_adapter(model, peft_type, length, tmp_path / str(length), seed=length)
        prefix = served.add(adapter)
        for prompt in prompts(3, seed=length):
            tokens = served.generate(prompt, prefix, count=COUNT)
            assert tokens == adapter.generate(prompt, COUNT)
            changed += tokens != served.generate(prompt, count=COUNT)
    assert changed >= 5, "the prefixes rarely change the output: the test is too weak"


@pytest.mark.parametrize("architecture", list(tiny_configs()))
def test_greedy_tokens_of_the_base_equal_those_of_transformers(
    architecture: str, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    served = serving(model)
    for prompt in prompts(4, seed=1):
        assert served.generate(prompt, count=COUNT) == plain_generate(model, prompt, COUNT)


@pytest.mark.parametrize(
    ("peft_type", "token_dim"),
    [
        ("PROMPT_TUNING", 32),
        ("P_TUNING", 32),
        ("CPT", 32),
        ("MULTITASK_PROMPT_TUNING", 32),
        ("PREFIX_TUNING", None),
        ("CARTRIDGE", None),
    ],
)
def test_a_prefix_has_the_width_of_the_input_embeddings(
    peft_type: str, token_dim: int | None, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    """PEFT takes the hidden size (64) as the width by default, and then fails to run it."""
    model = random_model(narrow_config())
    served = serving(model)
    assert served.base.shape.embedding_width == 32
    adapter = make_adapter(model, peft_type, 21, tmp_path, token_dim=token_dim)
    prefix = served.add(adapter)
    for prompt in prompts(3, seed=1):
        tokens = served.generate(prompt, prefix, count=COUNT)
        assert tokens == adapter.generate(prompt, COUNT)
        assert tokens != served.generate(prompt, count=COUNT)
