"""Rows under a constraint in the batches of free rows: both get the tokens they should."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.constraint import bit_mask
from tests.engine.constraints import Following, Rule
from tests.golden.golden_harness import (
    DEVICE,
    VOCAB,
    Served,
    make_adapter,
    plain_generate,
    prompts,
    tiny_model,
)
from tests.golden.test_golden_mixed import preempt_often

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 24


def allowed_after(output: tuple[int, ...]) -> range:
    """A third of the vocabulary, by the last token."""
    return range(sum(output[-1:]) % 3, VOCAB, 3)


class Thirds(Rule):
    """A constraint over the vocabulary of the tiny models."""

    def __init__(self) -> None:
        super().__init__(allowed_after)

    def start(self, ends: Any) -> Any:
        del ends
        return _Wide(allowed_after)


class _Wide(Following):
    def allowed(self, banned: Any) -> bytes:
        ids = set(allowed_after(tuple(self.output))) - set(banned)
        return bit_mask(ids, num_ids=VOCAB)


@torch.inference_mode()
def constrained_generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation by the model's own forward pass over the whole text."""
    output: list[int] = []
    for _ in range(count):
        logits = model(torch.tensor([prompt + output], device=DEVICE)).logits[0, -1]
        allowed = torch.tensor(list(allowed_after(tuple(output))), device=DEVICE)
        output.append(int(allowed[logits[allowed].argmax()]))
    return output


@pytest.mark.parametrize("tight", [False, True], ids=["large pool", "preempting"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_free_and_constrained_rows_get_their_tokens_in_one_batch(
    architecture: str, tight: bool, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    served = serving(model, **({"block_size": 4, "num_blocks": 64} if tight else {}))
    adapter = make_adapter(model, "PREFIX_TUNING", 9, tmp_path)
    prefix = served.add(adapter)
    if tight:
        preempt_often(served)
    texts = prompts(9, seed=5)
    with served.held():
        waits = [
            served.start(
                prompt,
                prefix if index % 3 == 2 else None,
                count=COUNT,
                constraint=Thirds() if index % 3 == 1 else None,
            )
            for index, prompt in enumerate(texts)
        ]
    reference = (plain_generate, constrained_generate)
    for index, (prompt, wait) in enumerate(zip(texts, waits, strict=True)):
        if index % 3 == 2:
            assert wait() == adapter.generate(prompt, COUNT), index
        else:
            assert wait() == reference[index % 3](model, prompt, COUNT), index
    assert (served.stats().preemptions > 0) is tight
    assert served.stats().masks >= 3 * COUNT
