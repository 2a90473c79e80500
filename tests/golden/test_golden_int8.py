"""int8 changes tokens, but not with the batch: mixed prefixes, preemption, reuse and swaps give the
tokens of each request alone."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixd.server.model.cpu.interface import KERNELS
from tests.golden.golden_harness import DEVICE, Served, prompts, tiny_model
from tests.golden.test_golden_mixed import alone, many_prefixes, preempt_often, together
from tests.model.cpu.native_library import native_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_mixed_batch_gives_the_tokens_of_each_request_alone(
    kernels: str, dtype: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    if DEVICE != "cpu":
        pytest.skip(f"int8 runs on a CPU, not on {DEVICE}")
    if (state := native_library().states()[kernels]) != "available":
        pytest.skip(f"{kernels}: {state}")
    model = tiny_model("qwen3")
    options = {"kernels": kernels, "dtype": dtype, "num_blocks": 400}
    single = serving(model, **options, quantize="int8")
    prefixes = many_prefixes(single, model, tmp_path)
    requests = [(text, prefixes[i % len(prefixes)]) for i, text in enumerate(prompts(24, seed=3))]
    expected = alone(single, requests)

    mixed = serving(
        model,
        **options,
        quantize="int8",
        max_prefill_chunk=7,
        max_resident_tokens=80,
        host_tokens=1000,
    )
    mixed.prefixes = single.prefixes
    preempt_often(mixed)
    for _ in range(2):  # the second time, KV is reused
        assert together(mixed, requests) == expected
    stats = mixed.stats()
    assert stats.preemptions > 0
    assert stats.kv_reused_tokens > 0
    assert stats.prefix_loads["host"] > 0

    unrounded = serving(model, **options)
    unrounded.prefixes = single.prefixes
    other = alone(unrounded, requests)
    assert expected != other, "int8 changes some token"
    equal = [tokens[0] == of_other[0] for tokens, of_other in zip(expected, other, strict=True)]
    assert sum(equal) >= 0.7 * len(equal)
