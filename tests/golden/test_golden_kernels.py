"""Every decoder and every set of kernels gives PEFT's tokens, under preemption, reuse and swaps."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoders import PAGED
from tests.golden.golden_harness import (
    Served,
    make_adapter,
    peft_configs,
    plain_generate,
    prompts,
    tiny_model,
)
from tests.golden.test_golden_mixed import COUNT, preempt_often, together
from tests.model.cpu.native_library import native_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTHS = [5, 16, 20, 33, 21, 32]  # full and partial blocks of 16


@pytest.mark.parametrize("kernels", ["module", "torch", *PAGED, *KERNELS])
def test_every_decoder_gives_the_tokens_of_peft(
    kernels: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    if kernels in KERNELS and (state := native_library().states()[kernels]) != "available":
        pytest.skip(f"{kernels}: {state}")
    model = tiny_model("llama")
    served = serving(
        model,
        kernels=kernels,
        num_blocks=400,
        max_prefill_chunk=7,
        max_resident_tokens=40,
        host_tokens=1000,
    )
    assert served.runner.decoder.name == kernels
    adapters = [
        make_adapter(model, peft_type, length, tmp_path / peft_type)
        for peft_type, length in zip(peft_configs(1), LENGTHS, strict=True)
    ]
    prefixes = [*map(served.add, adapters), None]
    texts = prompts(14, seed=3)
    requests = [(text, prefixes[i % len(prefixes)]) for i, text in enumerate(texts)]
    expected = [
        adapters[i % len(prefixes)].generate(text, COUNT)
        if i % len(prefixes) < len(adapters)
        else plain_generate(model, text, COUNT)
        for i, text in enumerate(texts)
    ]
    preempt_often(served)
    for _ in range(2):  # the second time, KV is reused
        assert together(served, requests) == expected
    stats = served.stats()
    assert stats.preemptions > 0
    assert stats.kv_reused_tokens > 0
    assert stats.prefix_loads["host"] > 0
