"""Memory that loading a model frees goes back to the system."""

import os
import platform
from pathlib import Path

import pytest

from prefixd.server.model import decoders
from prefixd.server.model.decoders import choose_decoder
from prefixd.server.model.memory import return_free_memory
from prefixd.server.model.selfcheck import self_check
from tests.model.test_decoders import POOL, base_of


def resident_kib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not Linux with glibc")
def test_freed_memory_between_used_blocks_is_returned():
    blocks = [bytearray(b"x") * (64 << 10) for _ in range(2000)]
    kept = blocks[::100]  # so that no end of the heap is free
    before = resident_kib()
    del blocks
    return_free_memory()
    assert resident_kib() < before - 100_000
    assert len(kept) == 20


def test_memory_is_returned_once_a_decoder_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: list[None] = []
    monkeypatch.setattr(decoders, "return_free_memory", lambda: calls.append(None))
    base = base_of()
    evidence = self_check(base, block_size=16, prefill_chunk=16).evidence
    choose_decoder(base_of, base, "torch", evidence=evidence, **POOL, data_folder=tmp_path)
    assert len(calls) == 1
