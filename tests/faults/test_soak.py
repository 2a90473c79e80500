"""Mixed traffic with injected faults: no leaks, no hangs, no wrong output.

On native kernels, and in every fourth phase on the GPU's decoder and runner, one step ahead.

``PREFIXD_SOAK_SECONDS`` sets the duration (default 90; ``make soak`` takes 20 minutes),
``PREFIXD_SOAK_SEED`` repeats a run.
"""

import asyncio
import itertools
import logging
import os
import secrets
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest

from prefixd.server.model import decoders
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoder import Decoder
from prefixd.server.model.load import LoadedBase
from tests.faults.faults_known import KnownState, digest_of
from tests.faults.faults_memory import resident_kib
from tests.faults.faults_model import (
    ALL_KINDS,
    MAX_TOKENS,
    library,
    make_model,
    make_prompts,
    save_model,
)
from tests.faults.faults_reference import Reference
from tests.faults.faults_runner import Fault, FaultyRunner
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_soak import Soak
from tests.model.cpu.native_library import native_library

SECONDS = float(os.environ.get("PREFIXD_SOAK_SECONDS", "90"))
SEED = os.environ.get("PREFIXD_SOAK_SEED") or secrets.token_hex(4)
TENANTS = ("acme", "beta", "crow")
BLOCK = HEAD_DIM = 16  # the least that native kernels take
CONTENTS = library(14, lengths=(5, 16, 20, 37), head_dim=HEAD_DIM, kinds=ALL_KINDS)
PROMPTS = make_prompts(14, lengths=(1, 7, 16, 24, 40))
SMALLEST = sum(-(-tokens // BLOCK) for tokens in (37, 40 + MAX_TOKENS + 37 % BLOCK)) * BLOCK
"""Positions that one sequence of the longest prompt under the longest prefix needs."""

PAGED = "module"
"""The setting that stands for the GPU's decoder and runner, one step ahead, which no setting takes
on a CPU."""

SIZES: dict[str, dict[str, Any]] = {
    "large": {"kv_tokens": 2048, "host_kv_tokens": 256},
    "ahead": {"kv_tokens": 5 * SMALLEST, "host_kv_tokens": 128, "cpu_kernels": PAGED},
    "small": {"kv_tokens": 3 * SMALLEST, "max_resident_tokens": 80},
    "smallest": {"kv_tokens": SMALLEST, "host_kv_tokens": 64},
}
CLIENTS, ACTIONS = 18, 12
MAX_PHASES = 12

_SLOPE = 0.35
"""Maximum growth of resident memory for each request, in KiB. A leaked response or sequence is
several KiB; SQLite's cache and label sets are bounded."""
_NOISE = 8 * 1024
"""Growth in KiB that the allocator may show in a run of any length."""


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 600)
def test_mixed_traffic_with_faults_leaks_nothing_and_gives_correct_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    native = native_library()
    monkeypatch.setattr(decoders, "find_or_compile_library", lambda _folder: native)
    make = decoders.make_decoder

    def make_any(base: LoadedBase, choice: str, **options: Any) -> Decoder:
        return make(base, "paged" if choice == PAGED else choice, **options)

    monkeypatch.setattr(decoders, "make_decoder", make_any)
    model = save_model(tmp_path / "model", head_dim=HEAD_DIM)
    logging.disable(logging.CRITICAL)  # pytest would store the log records of all injected failures
    try:
        report = _soak(model, tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    with capsys.disabled():
        print(f"\nsoak seed {SEED}: {report}")


def _soak(model: Path, scratch: Path) -> str:
    reference = Reference(PROMPTS, make_model(head_dim=HEAD_DIM))
    known = KnownState(CONTENTS, {digest_of(content, scratch): content for content in CONTENTS})
    parts = [content.in_parts for content in CONTENTS if content.kind == "soft"]
    for content in (None, *CONTENTS, *parts):
        reference.answer(content, 0)
    started = time.monotonic()
    threads = set(threading.enumerate())
    files: list[int] = []
    outcomes, numbers = Counter[str](), itertools.count(1)
    fired: Counter[Fault] = Counter()
    memory: list[tuple[int, int]] = []  # requests so far, KiB
    phase_s = max(10.0, min(60.0, SECONDS / (2 * len(SIZES))))
    for phase, size in zip(itertools.count(), itertools.cycle(SIZES)):
        over = time.monotonic() - started > SECONDS - phase_s / 2 and phase >= len(SIZES)
        # On a slow machine a rare fault may not have occurred yet.
        if over and (set(fired) == set(Fault) or phase >= MAX_PHASES):
            break
        seed = f"{SEED}/{phase}-{size}"
        with running(
            model,
            scratch / "data",
            tenants=TENANTS,
            wrap=FaultyRunner,
            **SIZES[size],
            block_size=BLOCK,
            max_tokens_per_step=64,
            max_prefill_chunk=16,
            max_running=16,
        ) as server:
            server.runner.engine = server.engine
            is_ahead = "cpu_kernels" in SIZES[size]
            assert server.runner.decoder.name in (("paged",) if is_ahead else KERNELS)
            assert server.runner.depth == is_ahead
            tasks = len(server.tasks())
            ends = time.monotonic() + phase_s
            for round_ in itertools.count():
                soak = Soak(
                    server, reference, known, TENANTS, f"{seed}/{round_}", numbers, outcomes
                )
                asyncio.run(soak.run(clients=CLIENTS, actions=ACTIONS))
                server.settle(tasks=tasks)
                _check_idle(server, seed)
                memory.append((sum(outcomes.values()), resident_kib()))
                if time.monotonic() > ends:
                    break
            fired += server.runner.fired
        remaining = set(threading.enumerate()) - threads
        for thread in remaining:
            thread.join(30)  # worker threads of a stopped event loop end shortly after it
        remaining = {thread for thread in remaining if thread.is_alive()}
        assert not remaining, f"{seed}: threads still run: {remaining}"
        files.append(open_files())
        assert files[-1] <= files[0], f"{seed}: files are still open: {files}"
    assert set(fired) == set(Fault), f"{SEED}: not every fault occurred: {fired}"
    kinds = ("base", "parts", *ALL_KINDS)
    assert all(outcomes[f"completed, {kind}"] for kind in kinds), f"{SEED}: {outcomes}"
    return f"{dict(outcomes)}; faults {dict(fired)}; {_check_memory(memory)}"


def _check_idle(server: RunningServer, seed: str) -> None:
    stats = server.engine.stats()
    held = stats.blocks_free + stats.blocks_prefix
    assert held == stats.blocks_total, f"{seed}: blocks leaked: {server.engine.core.scheduler!r}"


def _check_memory(memory: list[tuple[int, int]]) -> str:
    later = memory[len(memory) // 3 :]
    fit = linear_regression(*zip(*later, strict=True))
    grown = later[-1][1] - later[0][1]
    summary = (
        f"memory {later[0][1] / 1024:.0f} to {later[-1][1] / 1024:.0f} MiB over "
        f"{later[-1][0] - later[0][0]} requests, {fit.slope:.3f} KiB a request"
    )
    assert fit.slope < _SLOPE or grown < _NOISE, f"{SEED}: {summary}; {memory}"
    return summary
