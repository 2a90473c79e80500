"""Which decoders the server gives fewer threads while other processes need the cores."""

from pathlib import Path

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import Chunk, Step
from prefixd.server.model import decoders, thread_control
from prefixd.server.model.runner import Runner
from prefixd.server.serve.loading import load_model
from prefixd.server.serve.settings import Settings
from tests.model.cpu.native_library import native_library
from tests.model.tiny_folder import save_folder, tiny_llama

STEP = Step(chunks=[Chunk(0, [1, 2], 0, [1], sampling=SamplingParams(temperature=0))], fresh=[1])
WINDOW_S = 0.25


class BusyCores:
    """Two cores, of which other processes use all."""

    cores = 2
    now = 0.0

    def others_s(self) -> float:
        return 2 * self.now


@pytest.mark.parametrize(("kernels", "expected"), [("auto", [2]), ("torch", [2, 1])])
def test_only_the_decoders_of_torch_are_governed(
    kernels: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = native_library()
    monkeypatch.setattr(decoders, "find_or_compile_library", lambda _folder: library)
    cores = BusyCores()
    monkeypatch.setattr(thread_control, "CoreUse", lambda: cores)
    folder = save_folder(tiny_llama(hidden_size=32), tmp_path / "model")
    settings = Settings(model=str(folder), data_dir=tmp_path / "data", cpu_kernels=kernels)
    config = SchedulerConfig(num_blocks=8, block_size=16)
    runner = load_model(settings, config, device="cpu", threads=2).runner
    assert isinstance(runner, Runner)
    numbers: list[int] = []
    monkeypatch.setattr(runner.decoder, "set_threads", numbers.append)
    monkeypatch.setattr("time.monotonic", lambda: cores.now)
    uses = []
    for _ in range(10):
        cores.now += WINDOW_S
        uses.append(runner.run(STEP).thread_use)
    assert numbers == expected
    assert uses[-1] is not None
    assert 1 <= uses[-1].threads <= numbers[-1]
