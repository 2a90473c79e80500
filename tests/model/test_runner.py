"""The runner detects out-of-memory errors and passes other errors on."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.runner import OutOfMemory
from prefixd.server.engine.step import Chunk, Step
from prefixd.server.model.load import prepare_base
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.runner import Runner

STEP = Step(chunks=[Chunk(0, [1, 2], 0, [1], sampling=SamplingParams(temperature=0))], fresh=[1])


@pytest.fixture(scope="module")
def runner() -> Runner:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    base = prepare_base(LlamaForCausalLM(config), None, name="tiny", dtype="float32", device="cpu")
    return Runner(ModuleDecoder(base, num_blocks=4, block_size=4))


def test_a_failed_cpu_allocation_is_out_of_memory_and_the_next_step_runs(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner.decoder, "forward", lambda *_: torch.empty(1 << 60))
        with pytest.raises(OutOfMemory, match="can't allocate memory"):
            runner.run(STEP)
    assert list(runner.run(STEP).sampled) == [0]


class AcceleratorError(RuntimeError):
    """Newer versions of torch raise this for errors of the CUDA runtime."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
    ],
)
def test_every_out_of_memory_error_of_torch_is_detected(
    error: Exception, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(runner.decoder, "forward", fail)
    with pytest.raises(OutOfMemory) as caught:
        runner.run(STEP)
    assert caught.value.__cause__ is error


def test_another_cuda_error_is_not_out_of_memory(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner.decoder, "forward", fail)
    with pytest.raises(AcceleratorError):
        runner.run(STEP)


def test_another_runtime_error_is_raised_unchanged(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.decoder, "forward", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        runner.run(STEP)
