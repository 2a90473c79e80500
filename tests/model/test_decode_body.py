"""A steady decode step on the device: nothing in it waits for the device or leaves it.

The body reaches from the filled device buffers to the sampled tokens. The copy in
(``StepBuffers.send``) and the copy out lie outside.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from prefixd.server.model import kernels, paged_mlp
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import StepBuffers, StepTensors
from prefixd.server.model.decoder import Logits
from prefixd.server.model.decoders import make_decoder
from prefixd.server.model.device_sampler import sample_rows
from prefixd.server.model.kernels import RaggedRows
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.paged import PagedDecoder, PagedWeights, hidden_states
from prefixd.server.model.sampling_plan import Plan, num_bytes, views
from tests.model.device_modes import Refused, fake_cuda
from tests.model.test_decoders import POOL, base_of

ROWS = 8
DRAWN = Plan(rows=ROWS, plain=ROWS)
"""All rows are drawn at a temperature."""
VIEWS = {"aten::t", "aten::view", "aten::_unsafe_view", "aten::slice", "aten::reshape"}


def make(family: str, folder: Path, *, dtype: str = "float32") -> PagedDecoder:
    made = make_decoder(base_of(family, dtype), "paged", **POOL, data_folder=folder)
    assert isinstance(made, PagedDecoder)
    return made


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> PagedDecoder:
    return make("qwen3", tmp_path_factory.mktemp("decode"))


def on_device(value: Any) -> Any:
    """The same tree with fake CUDA tensors."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")
    if isinstance(value, RaggedRows):
        return RaggedRows(*map(on_device, value))
    if isinstance(value, tuple):
        return tuple(map(on_device, value))
    if is_dataclass(value):
        kind: Any = type(value)
        return kind(**{each.name: on_device(getattr(value, each.name)) for each in fields(value)})
    return value


def run_body(decoder: PagedDecoder) -> list[str]:
    """Run the body of a decode step on fake CUDA tensors; returns its operations."""
    buffers = StepBuffers(
        block_size=decoder.block_size, scratch_slot=99, device=torch.device("cpu")
    )
    buffers.fill(FlatBatch(), num_rows=ROWS)
    filled = buffers.tensors()
    with torch.inference_mode(), fake_cuda() as mode:
        weights: PagedWeights = on_device(decoder.weights)
        step: StepTensors = on_device(filled)
        cache = KVCache(
            decoder.base.layers,
            num_blocks=8,
            block_size=decoder.block_size,
            dtype=decoder.base.dtype,
            device=torch.device("cuda"),
        )
        settings = torch.empty(num_bytes(DRAWN), dtype=torch.uint8, device="cuda")
        asked = views(settings, DRAWN)
        mode.ops.clear()
        embeddings = functional.embedding(step.token_ids(), weights.embedding)
        hidden = hidden_states(weights, cache, step, embeddings)
        logits = functional.linear(hidden, weights.head.weight, weights.head.bias)
        assert sample_rows(Logits(logits), DRAWN, asked, None).shape == (2 * ROWS,)
        return [name for name in mode.ops if name.partition(".")[0] not in VIEWS]


def test_a_decode_step_neither_leaves_the_device_nor_depends_on_data(
    decoder: PagedDecoder,
) -> None:
    names = run_body(decoder)
    layers = decoder.base.shape.num_layers
    for name, count in (
        ("rotate_and_write", layers),
        ("attend", layers),
        ("add_rms_norm", 2 * layers),
        ("silu_and_mul", layers),
    ):
        assert names.count(f"prefixd::{name}") == count
    assert names.count("aten::linear") == 4 * layers + 1


def test_experts_neither_leave_the_device_nor_depend_on_data(tmp_path: Path) -> None:
    decoder = make("qwen2_moe", tmp_path, dtype="bfloat16")
    names = run_body(decoder)
    layers = decoder.base.shape.num_layers
    assert names.count("aten::_grouped_mm") == 2 * layers
    assert names.count("prefixd::silu_and_mul") == 2 * layers  # those of the experts, and shared


WAITING: dict[str, Callable[[torch.Tensor], object]] = {
    "cpu": lambda x: x.cpu(),
    "item": lambda x: x.sum().item(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("wait", WAITING.values(), ids=WAITING.keys())
def test_a_layer_that_waits_for_the_device_is_refused(
    wait: Callable[[torch.Tensor], object], decoder: PagedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = kernels.silu_and_mul

    def waiting(gate_up: torch.Tensor) -> torch.Tensor:
        wait(gate_up)
        return gate(gate_up)

    monkeypatch.setattr(paged_mlp, "silu_and_mul", waiting)
    with pytest.raises(Refused):
        run_body(decoder)
