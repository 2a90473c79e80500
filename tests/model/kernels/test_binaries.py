"""The kernels compile for GPUs without one, and the binaries keep what their speed depends on."""

from pathlib import Path

import pytest

from benchmarks.kernels import Binary, compile_for, launches

ATTENTION = {"decode_own_positions", "decode_shared_prefix", "prefill_tiles"}
KERNELS = {*ATTENTION, "combine", "write", "rotate", "rotate normed", "add_norm", "gate"}


@pytest.fixture(autouse=True)
def _compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, which Triton 3.9 warns about


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_neither_spill_nor_wait_for_loads(capability: int) -> None:
    binaries = [compile_for(launch, capability) for launch in launches(128, capability)]
    binaries += [
        compile_for(launch, capability)
        for launch in launches(64, capability)
        if launch.kernel.__name__ in ATTENTION
    ]
    assert {binary.kernel for binary in binaries} == KERNELS
    assert [b for b in binaries if b.local_bytes or b.registers > 168] == []
    assert [b for b in binaries if b.kernel in ATTENTION and not b.async_copies] == []
    assert [b for b in binaries if programs_at_once(b) < 1] == []


def programs_at_once(binary: Binary) -> int:
    """By shared memory, of which a program may have 163 KB on sm_80 and 227 KB on sm_90."""
    most = (163 if binary.capability == 80 else 227) * 1024
    return most // max(1, binary.shared_bytes)
