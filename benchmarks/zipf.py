"""W5: Poisson arrivals over HTTP, prefixes by Zipf's law out of 100,000 uploaded, 1,000 resident.

``python -m benchmarks.zipf [--prefixes 100000] [--resident 1000] [--out results.json]``

1. The data folder is prepared (``benchmarks.catalog_folder``), or used again.
2. One-token requests drawn as in the measurement fill the pool until prefixes are evicted.
3. Idle: one request at a time, alternately under a resident prefix and under one never used.
4. Saturation: responses per second of 32 clients that send the next request when one ends.
5. Requests arrive at 70 % of that. Just before one is due, the server is asked whether its prefix
   is resident: hits and loads are counted apart. Times count from when a request was due.
6. W1 (32 x (64 + 64) on the base), alternately on this server and on one with 8 prefixes.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import catalog_folder, host
from benchmarks.serving import MODEL, stated, write
from benchmarks.zipf_site import CLIENTS, Sent, Site, serving, site_of
from prefixd.server.cli.bench.summary import percentile
from prefixd.server.model.demo import default_cache_dir, demo_model
from prefixd.store.artifact.base_spec import BaseSpec

FOLDERS = Path("~/.cache/prefixd-bench").expanduser()


def times(results: list[Sent]) -> dict[str, float | int | None]:
    """Number and percentiles of times to first token, in milliseconds."""
    ordered = sorted(1000 * one.result.ttft for one in results)
    named = {"p50": 50, "p90": 90, "p99": 99}
    return {
        "requests": len(ordered),
        **{key: percentile(ordered, at) if ordered else None for key, at in named.items()},
    }


async def measure_w5(site: Site) -> dict[str, Any]:
    """Steps 2 to 5 of the module's text."""
    options = site.options
    warmed = await site.warm_up()
    print(f"pool full after {warmed} requests", flush=True)
    idle = await site.idle(options.idle_rounds)
    print(f"idle TTFT: {1000 * idle['hit']:.1f} ms, with a load {1000 * idle['load']:.1f} ms")
    models = site.draw(options.requests)
    saturation = options.requests / await site.closed_loop(models, output=options.output)
    rate = options.share * saturation
    print(f"saturation {saturation:.2f}/s; arrivals at {rate:.2f}/s", flush=True)
    before = await site.metrics()
    meter = host.LoadMeter(measured=site.session, ours={os.getsid(0)})
    sent = await site.open_loop(rate, options.requests)
    load = meter.read()
    after = await site.metrics()
    hits = [one for one in sent if one.is_hit]
    loads = [one for one in sent if not one.is_hit]
    p99 = times(hits)["p99"]
    return {
        "warm_up_requests": warmed,
        "saturation_per_s": saturation,
        "rate_per_s": rate,
        "idle_ttft_ms": {kind: 1000 * value for kind, value in idle.items()},
        "hits_ttft_ms": times(hits),
        "loads_ttft_ms": times(loads),
        "all_ttft_ms": times(sent),
        "p99_of_hits_to_idle": p99 / (1000 * idle["hit"]) if p99 else None,
        "latest_send_ms": 1000 * max(one.result.late for one in sent),
        "evictions": after["prefixd_prefix_evictions_total"]
        - before["prefixd_prefix_evictions_total"],
        "compiles": after["prefixd_prefix_compiles_total"]
        - before["prefixd_prefix_compiles_total"],
        "foreign_cores": load.foreign + load.steal,
    }


async def w1(site: Site) -> float:
    """Output tokens per second of W1 on the base."""
    return CLIENTS * 64 / await site.closed_loop([MODEL] * CLIENTS, output=64, words=64)


def base_of_the_demo_model(options: argparse.Namespace) -> BaseSpec:
    """What the catalog records of the base: from the model, loaded here for a moment."""
    from prefixd.server.serve.build import build_server  # noqa: PLC0415 - loads the model
    from prefixd.server.serve.settings import Settings  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        model = str(demo_model(default_cache_dir()))
        settings = Settings(data_dir=Path(scratch), model=model, dtype=options.dtype)
        return build_server(settings).served.base


def prepare_folders(folders: Mapping[int, Path], options: argparse.Namespace) -> None:
    """Fill the folders that lack their number of prefixes."""
    length = options.virtual_tokens
    missing = {
        number: folder
        for number, folder in folders.items()
        if not catalog_folder.is_prepared(folder, count=number, virtual_tokens=length)
    }
    base = base_of_the_demo_model(options) if missing else None
    for number, folder in missing.items():
        assert base is not None
        seconds = catalog_folder.prepare(folder, count=number, virtual_tokens=length, base=base)
        print(f"{folder}: {number} prefixes, prepared in {seconds:.0f} s", flush=True)


async def w1_alone(site: Site) -> float:
    """As ``w1``; its connections are closed with its event loop."""
    try:
        return await w1(site)
    finally:
        site.target.pool.close()


def compare_w1(sites: dict[str, Site], rounds: int) -> dict[str, Any]:
    """Alternate W1 on two servers; medians of the rounds after the first, and their ratio."""
    rates: dict[str, list[float]] = {name: [] for name in sites}
    noise = []
    for number in range(rounds + 1):
        for name, site in list(sites.items())[:: 1 if number % 2 else -1]:
            meter = host.LoadMeter(measured=site.session, ours={os.getsid(0)})
            rate = asyncio.run(w1_alone(site))
            load = meter.read()
            print(f"W1 round {number}, {name}: {rate:.1f} tokens/s", flush=True)
            if number:
                rates[name].append(rate)
                noise.append(load.foreign + load.steal)
    median = {name: statistics.median(values) for name, values in rates.items()}
    few, many = median.values()
    return {"tokens_per_s": median, "many_to_few": many / few, "foreign_cores": max(noise)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All steps."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    counts = [8, options.prefixes] if options.rounds else [options.prefixes]
    folders = {number: options.folders / str(number) for number in counts}
    prepare_folders(folders, options)
    report: dict[str, Any] = {
        "machine": host.processor(Path("/proc/cpuinfo").read_text()),
        "options": stated(options),
    }
    with ExitStack() as closing:
        started = time.perf_counter()
        servers = {}
        for number, folder in folders.items():
            servers[number] = closing.enter_context(serving(folder, options))
            report[f"start_s_with_{number}"] = time.perf_counter() - started
            started = time.perf_counter()
        sites = {
            str(number): site_of(server, folders[number], options)
            for number, server in servers.items()
        }
        if options.rounds:
            report["W1"] = compare_w1(sites, options.rounds)
        report["W5"] = asyncio.run(measure_w5(sites[str(options.prefixes)]))
    return report


def main() -> None:
    """Measure, print the figures and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefixes", type=int, default=100_000)
    parser.add_argument("--resident", type=int, default=1000)
    parser.add_argument("--virtual-tokens", type=int, default=20)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--idle-rounds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5, help="of W1; 0: W5 alone")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folders", type=Path, default=FOLDERS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers end too
    report = run(options)
    print(json.dumps(report, indent=2))
    write(options.out, report)


if __name__ == "__main__":
    main()
