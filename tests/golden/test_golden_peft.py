"""Must be true 1: greedy float32 tokens equal PEFT's own, for every type and architecture."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden.golden_harness import (
    Served,
    make_adapter,
    peft_configs,
    plain_generate,
    prompts,
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
def test_same_tokens_as_peft(
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
    assert changed >= 5, "the prefixes hardly change anything: the test proves nothing"


@pytest.mark.parametrize("architecture", list(tiny_configs()))
def test_the_bare_base_says_what_transformers_says(
    architecture: str, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    served = serving(model)
    for prompt in prompts(4, seed=1):
        assert served.generate(prompt, count=COUNT) == plain_generate(model, prompt, COUNT)
