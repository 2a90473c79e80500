"""What HTTP costs: W1 and the time to first token over HTTP, against the engine in its process.

``python -m benchmarks.http_overhead [--rounds 5] [--threads 2] [--out results.json]``

Two processes with the same model and settings, the one not measured stopped: ``prefixd serve`` with
32 streaming clients in this process, and the server's engine without HTTP
(``benchmarks.peers.prefixd_engine``). The requests of a round are the same token ids, fresh in each
round. They alternate, medians are reported, and the first round is not counted. The client shares
the cores with the server, as that of a user on the same machine would; its CPU time is reported.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import host
from benchmarks.children import Child, Measured
from benchmarks.engines import OURS
from benchmarks.serving import MODEL, BenchServer, write
from benchmarks.workloads import WORKLOADS, Figure, Prompts, Workload
from prefixd.server.cli.bench.connection import ConnectionPool
from prefixd.server.cli.bench.generation import Target
from prefixd.server.cli.demo.child import admin
from prefixd.server.model.demo import default_cache_dir, demo_model

FIRST = Workload("first", "one prompt of 64", Figure.SECONDS, requests=1, output=2)
CASES = (WORKLOADS["W1"], FIRST)

Requests = Sequence[Mapping[str, Any]]


@dataclass
class HttpEngine:
    """A server behind its socket; its threads are stopped between runs."""

    server: BenchServer
    key: str
    client_cpu: list[float] = field(default_factory=list)

    def run(self, requests: Requests, output: int) -> Measured:
        """Stream all requests at once."""
        os.killpg(self.server.pid, signal.SIGCONT)
        meter = host.LoadMeter(measured=self.server.pid, ours={os.getsid(0)})
        cpu = time.process_time()
        try:
            seconds, first = asyncio.run(self._streamed(requests, output))
        finally:
            self.client_cpu.append(time.process_time() - cpu)
            load = meter.read()
            os.killpg(self.server.pid, signal.SIGSTOP)
        return Measured(seconds, first, [[]] * len(requests), load)

    async def _streamed(self, requests: Requests, output: int) -> tuple[float, list[float]]:
        """Seconds of all, and those to the first token of each."""
        pool = ConnectionPool(self.server.url, {"authorization": f"Bearer {self.key}"})
        target = Target(pool, "completions", timeout=300.0)
        started = time.perf_counter()
        results = await asyncio.gather(
            *(
                target.generate(request["tokens"], model=MODEL, output_tokens=output, due=started)
                for request in requests
            )
        )
        seconds = time.perf_counter() - started
        assert {result.output_tokens for result in results} == {output}
        pool.close()
        return seconds, [result.ttft for result in results]


def measure(
    engines: Mapping[str, HttpEngine | Child], workload: Workload, *, rounds: int, noise: float
) -> dict[str, Any]:
    """Alternate the engines: all runs after the first round, those with little foreign load."""
    prompts = Prompts(seed=str(os.getpid()))
    runs: dict[str, list[Measured]] = {name: [] for name in engines}
    dropped = 0
    for number in range(rounds + 1):
        requests = prompts.take(workload)
        order = list(engines.items())[:: 1 if number % 2 else -1]
        current = {name: engine.run(requests, workload.output) for name, engine in order}
        line = ", ".join(f"{name} {run.seconds:.3f} s" for name, run in current.items())
        print(f"{workload.name} round {number}: {line}", flush=True)
        if number == 0:
            continue
        if any(run.load.foreign + run.load.steal > noise for run in current.values()):
            dropped += 1
            continue
        for name, run in current.items():
            runs[name].append(run)
    return {"rounds": rounds, "dropped": dropped, **_figures(runs, workload)}


def _figures(runs: Mapping[str, Sequence[Measured]], workload: Workload) -> dict[str, Any]:
    if not runs["http"]:
        return {}
    seconds = {name: [run.seconds for run in each] for name, each in runs.items()}
    first = {name: [1000 * run.first[0] for run in each] for name, each in runs.items()}
    tokens = workload.requests * workload.output
    pairs = zip(seconds["engine"], seconds["http"], strict=True)
    more = zip(first["http"], first["engine"], strict=True)
    return {
        "tokens_per_s": {
            name: statistics.median(tokens / each for each in values)
            for name, values in seconds.items()
        },
        "http_to_engine": statistics.median(engine / http for engine, http in pairs),
        "first_token_ms": {name: statistics.median(each) for name, each in first.items()},
        "first_token_more_ms": statistics.median(http - engine for http, engine in more),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Load both and measure both cases."""
    os.environ.update(
        HF_HUB_OFFLINE="1", PREFIXD_DTYPE=options.dtype, PREFIXD_THREADS=str(options.threads)
    )
    model = str(demo_model(default_cache_dir()))
    start = {"model": model, "dtype": options.dtype, "threads": options.threads, "prefixes": {}}
    report: dict[str, Any] = {
        "machine": host.processor(Path("/proc/cpuinfo").read_text()),
        "dtype": options.dtype,
        "threads": options.threads,
    }
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        admin(data, "tenant", "create", "bench")
        issued = admin(data, "key", "create", "--tenant", "bench")
        assert isinstance(issued, dict)
        flags = (
            *("--model", model, "--served-model-name", MODEL),
            *("--kv-reuse", "false", "--max-queue-wait", "0"),
        )
        with BenchServer(data, flags) as server:
            server.wait_until_ready(timeout=600, on_event=lambda _: None)
            http = HttpEngine(server, str(issued["key"]))
            os.killpg(server.pid, signal.SIGSTOP)
            try:
                with Child(OURS, Path(sys.executable), start, ours={server.pid}) as engine:
                    engine.wait()
                    engines: dict[str, HttpEngine | Child] = {"engine": engine, "http": http}
                    for case in CASES:
                        rounds = options.rounds if case.requests > 1 else 4 * options.rounds
                        report[case.name] = measure(
                            engines, case, rounds=rounds, noise=options.noise
                        )
            finally:
                os.killpg(server.pid, signal.SIGCONT)
    report["client_cpu_s"] = statistics.median(http.client_cpu[: options.rounds + 1])
    return report


def main() -> None:
    """Measure, print the figures and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends too
    report = run(options)
    print(json.dumps(report, indent=2))
    write(options.out, report)


if __name__ == "__main__":
    main()
