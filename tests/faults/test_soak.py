"""Must be true 6: mixed traffic with faults, and nothing leaks, sticks or answers wrongly.

``PREFIXD_SOAK_SECONDS`` bounds it (90 by default, ``make soak`` takes 20 minutes) and
``PREFIXD_SOAK_SEED`` repeats one.
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

from tests.faults.faults_memory import resident_kib
from tests.faults.faults_model import MOST_TOKENS, Oracle, library, make_prompts
from tests.faults.faults_runner import Fault, FaultyRunner
from tests.faults.faults_soak import Book, Soak, digest_of
from tests.faults.faults_world import World, running

SECONDS = float(os.environ.get("PREFIXD_SOAK_SECONDS", "90"))
SEED = os.environ.get("PREFIXD_SOAK_SEED") or secrets.token_hex(4)
TENANTS = ("acme", "beta", "crow")
BLOCK = 8
CONTENTS = library(14, lengths=(5, 16, 20, 37))
PROMPTS = make_prompts(14, lengths=(1, 7, 16, 24, 40))
LEAST = sum(-(-tokens // BLOCK) for tokens in (37, 40 + MOST_TOKENS + 37 % BLOCK)) * BLOCK
"""Positions that just admit one sequence of the longest prompt under the longest prefix."""

SIZES: dict[str, dict[str, Any]] = {
    "roomy": {"kv_tokens": 2048, "host_kv_tokens": 256},
    "tight": {"kv_tokens": 3 * LEAST, "max_resident_tokens": 80},
    "least": {"kv_tokens": LEAST, "host_kv_tokens": 64},
}
CLIENTS, ACTIONS = 18, 12
MOST_PHASES = 12

_SLOPE = 0.35
"""Most KiB of resident memory that a request may leave behind. A leaked answer or sequence is
several KiB; what stays for good reasons (rows in SQLite's cache, label sets) is bounded."""
_NOISE = 8 * 1024
"""KiB by which the allocator may end above where it began, however long the run."""


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 600)
def test_soak(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logging.disable(logging.CRITICAL)  # pytest would keep every injected failure's record
    try:
        report = _soak(tiny_folder, tmp_path)
    finally:
        logging.disable(logging.NOTSET)
    with capsys.disabled():
        print(f"\nsoak seed {SEED}: {report}")


def _soak(model: Path, scratch: Path) -> str:
    oracle = Oracle(PROMPTS)
    book = Book(CONTENTS, {digest_of(content, scratch): content for content in CONTENTS})
    for content in (None, *CONTENTS):
        oracle.answer(content, 0)
    started = time.monotonic()
    threads = set(threading.enumerate())
    files: list[int] = []
    happened, numbers = Counter[str](), itertools.count(1)
    fired: Counter[Fault] = Counter()
    memory: list[tuple[int, int]] = []  # requests so far, KiB
    phase_s = max(10.0, min(60.0, SECONDS / (2 * len(SIZES))))
    for phase, size in zip(itertools.count(), itertools.cycle(SIZES)):
        over = time.monotonic() - started > SECONDS - phase_s / 2 and phase >= len(SIZES)
        # On a slow machine a rare fault may not have had its turn yet.
        if over and (set(fired) == set(Fault) or phase >= MOST_PHASES):
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
        ) as world:
            world.runner.engine = world.engine
            tasks = len(world.tasks())
            ends = time.monotonic() + phase_s
            for round_ in itertools.count():
                soak = Soak(world, oracle, book, TENANTS, f"{seed}/{round_}", numbers, happened)
                asyncio.run(soak.run(clients=CLIENTS, actions=ACTIONS))
                world.settle(tasks=tasks)
                _check_idle(world, seed)
                memory.append((sum(happened.values()), resident_kib()))
                if time.monotonic() > ends:
                    break
            fired += world.runner.fired
        left = set(threading.enumerate()) - threads
        for thread in left:
            thread.join(30)  # a loop that has ended tells its worker threads to end, in a moment
        left = {thread for thread in left if thread.is_alive()}
        assert not left, f"{seed}: threads are left: {left}"
        files.append(open_files())
        assert files[-1] <= files[0], f"{seed}: files are left open: {files}"
    assert set(fired) == set(Fault), f"{SEED}: not every fault was tried: {fired}"
    return f"{dict(happened)}; faults {dict(fired)}; {_check_memory(memory)}"


def _check_idle(world: World, seed: str) -> None:
    stats = world.engine.stats()
    held = stats.blocks_free + stats.blocks_prefix
    assert held == stats.blocks_total, f"{seed}: blocks leaked: {world.engine.loop.scheduler!r}"


def _check_memory(memory: list[tuple[int, int]]) -> str:
    later = memory[len(memory) // 3 :]
    fit = linear_regression(*zip(*later, strict=True))
    grown = later[-1][1] - later[0][1]
    told = (
        f"memory {later[0][1] / 1024:.0f} to {later[-1][1] / 1024:.0f} MiB over "
        f"{later[-1][0] - later[0][0]} requests, {fit.slope:.3f} KiB a request"
    )
    assert fit.slope < _SLOPE or grown < _NOISE, f"{SEED}: {told}; {memory}"
    return told
