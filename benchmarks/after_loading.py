"""Whether loading prefixes slows what comes afterwards: W1 before and after 100 of 1,024 tokens.

``python -m benchmarks.after_loading [--prefixes 100] [--virtual-tokens 1024] [--out results.json]``

Two servers of the same model and settings. W1 (32 x (64 + 64) on the base, over HTTP) alternates
between them; then one of them loads all prefixes, by a request of one token under each; then W1
alternates again. What loading changed is the difference of the two ratios.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import host
from benchmarks.catalog_folder import name_of
from benchmarks.serving import stated, write
from benchmarks.zipf import FOLDERS, compare_w1, prepare_folders
from benchmarks.zipf_site import Site, serving, site_of


async def load_all(site: Site) -> dict[str, float]:
    """Load every prefix of the site; the seconds, and how many were compiled."""
    started = time.perf_counter()
    try:
        models = [name_of(number) for number in range(site.options.prefixes)]
        await site.closed_loop(models, output=1, words=1)
        metrics = await site.metrics()
    finally:
        site.target.pool.close()
    return {
        "seconds": time.perf_counter() - started,
        "compiles": metrics["prefixd_prefix_compiles_total"],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All steps."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folders = {1: options.folders / "1", options.prefixes: options.folders / str(options.prefixes)}
    prepare_folders(folders, options)
    with ExitStack() as closing:
        sites = {}
        for number, folder in folders.items():
            server = closing.enter_context(serving(folder, options))
            sites["loads" if number > 1 else "does not"] = site_of(server, folder, options)
        before = compare_w1(sites, options.rounds)
        loaded = asyncio.run(load_all(sites["loads"]))
        after = compare_w1(sites, options.rounds)
    return {
        "machine": host.processor(Path("/proc/cpuinfo").read_text()),
        "options": stated(options),
        "before": before,
        "loaded": loaded,
        "after": after,
        "after_to_before": after["many_to_few"] / before["many_to_few"],
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefixes", type=int, default=100)
    parser.add_argument("--virtual-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folders", type=Path, default=FOLDERS / "loading")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.resident, options.input, options.output = options.prefixes, 64, 64
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the servers end too
    report = run(options)
    print(json.dumps(report, indent=2))
    write(options.out, report)


if __name__ == "__main__":
    main()
