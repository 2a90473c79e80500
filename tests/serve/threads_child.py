"""Loads a model as the server does and then many large prefixes, and prints which threads libraries
have started by then: ``python -m tests.serve.threads_child FOLDER``."""

import json
import queue
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from prefixd.server.api.thread_metrics import library_threads
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishEvent,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.model.prefix import StorePrefixSource
from prefixd.server.serve.build import Server, build_server
from prefixd.server.serve.settings import Settings
from prefixd.store.artifact.artifact import Artifact
from prefixd.store.artifact.kinds import Kind
from tests.faults.faults_model import HEAD_DIM, KV_HEADS, LAYERS, save_model

PREFIXES, TOKENS = 100, 1024


def large_prefix(_key: PrefixKey) -> Artifact:
    """A KV prefix whose conversion is large enough for torch to run it in parallel."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((TOKENS, 2 * LAYERS * KV_HEADS * HEAD_DIM)).astype(np.float32)
    return Artifact(Kind.KV_PREFIX, "PREFIX_TUNING", TOKENS, "F32", None, None, values, None)


def generate(server: Server, *, prompt: int, prefix: PrefixHandle | None = None) -> None:
    """Run one request with ``prompt`` tokens."""
    ended: queue.Queue[object] = queue.Queue()
    request = AdmittedRequest(
        request_id=f"under {prefix}",
        tenant="acme",
        prompt=(3,) * prompt,
        prefix=prefix,
        sampling=SamplingParams(temperature=0.0),
        stop=StopParams(max_tokens=2),
        kv_reuse=False,
    )
    server.engine.submit(request, lambda e: ended.put(e) if isinstance(e, FinishEvent) else None)
    event = ended.get(timeout=60)
    assert isinstance(event, FinishEvent), event
    assert event.error is None, event


def openmp_threads() -> Counter[str]:
    """Threads that wait in libgomp, by their names; those that still spin are waited for."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in maps if "libgomp" in line[-1]]
    code = [range(int(start, 16), int(end, 16)) for start, end in ranges]
    waiting: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        if task.name == str(threading.get_native_id()):
            continue
        while len(state := (task / "syscall").read_text().split()) == 1:
            threading.Event().wait(0.01)
        name = (task / "comm").read_text().strip()
        waiting[name] += any(int(state[-1], 16) in part for part in code)
    return +waiting


def main(folder: Path) -> None:
    """Count before and after the prefixes."""
    server = build_server(
        Settings(
            model=str(save_model(folder / "model")),
            data_dir=folder / "data",
            dtype="bfloat16",
            threads=2,
            kv_tokens=PREFIXES * TOKENS + 4096,
            max_resident_tokens=PREFIXES * TOKENS,
        )
    )
    engine = server.engine
    runner: Any = engine.core._pipeline.runner
    engine.core._fetcher._source = StorePrefixSource(
        open_artifact=large_prefix, base=runner.decoder.base, tokenizer=None
    )
    engine.start()
    generate(server, prompt=900)  # enough for parallel operations
    before = library_threads()
    for number in range(PREFIXES):
        handle = PrefixHandle(PrefixKey("acme", str(number)), TOKENS)
        generate(server, prompt=1, prefix=handle)
    stats = engine.stats()
    counts = {
        "before": before,
        "after": library_threads(),
        "openmp": openmp_threads(),
        "resident": stats.prefixes_resident,
    }
    print(json.dumps(counts))
    engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
