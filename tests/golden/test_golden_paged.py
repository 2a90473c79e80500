"""The GPU's decoder and runner, on a CPU and one step ahead of the engine, give PEFT's tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixd.server.model.device_runner import DeviceRunner
from tests.golden.golden_harness import Served, make_adapter, plain_generate, prompts, tiny_model
from tests.golden.test_golden_mixed import preempt_often

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 12


def test_a_mixed_batch_one_step_ahead_gives_the_tokens_of_peft(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, kernels="paged", num_blocks=64, max_prefill_chunk=16)
    assert isinstance(served.runner, DeviceRunner)
    adapters = [
        make_adapter(model, peft_type, length, tmp_path / peft_type)
        for peft_type, length in (("PROMPT_TUNING", 21), ("PREFIX_TUNING", 33))
    ]
    prefixes = [*map(served.add, adapters), None]
    preempt_often(served)
    texts = prompts(6, seed=3)
    with served.held():
        waits = [served.start(text, prefixes[i % 3], count=COUNT) for i, text in enumerate(texts)]
    for i, (text, wait) in enumerate(zip(texts, waits, strict=True)):
        if i % 3 < 2:
            assert wait() == adapters[i % 3].generate(text, COUNT)
        else:
            assert wait() == plain_generate(model, text, COUNT)
    assert served.stats().preemptions > 0
