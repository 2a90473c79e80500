"""prefixd and other engines, alternating in one run on the same weights and prompts.

``python -m benchmarks.compare [--peers FOLDER] [--only NAME ...] [--workload NAME ...]``

Engines run in this process's environment or in those that ``benchmarks/peers/install.sh FOLDER``
makes; one that is missing is named in the report and the others run. Workloads are those of
``workloads.py``. Conditions: ``quiet`` has two threads on an otherwise idle machine, ``shared`` one
thread next to a process that keeps a core busy, ``crowded`` two threads next to it.

``--variant`` adds another configuration of prefixd, such as ``portable=cpu_kernels=portable`` (with
``PREFIXD_CPU_KERNELS=portable``) or ``before=revision=0d58078``. Results go to ``--out`` as JSON,
with plots next to it where matplotlib is installed.
"""

import argparse
import contextlib
import datetime as dt
import fcntl
import os
import platform
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import host, report
from benchmarks.agreement import check_tokens
from benchmarks.children import Child, EngineFailed, Measured, checkout, interpreter
from benchmarks.engines import OURS, PEERS, Engine, variant
from benchmarks.models import model_path, prefixes
from benchmarks.rounds import Contest, measure
from benchmarks.workloads import WORKLOADS, Prompts, Workload

THREADS = {"quiet": 2, "shared": 1, "crowded": 2}
QUICK_PEERS = ("transformers",)
QUICK_WORKLOADS = ("W1", "W3", "long")


def main() -> None:
    """Measure, print tables, and write the results."""
    # Terminated, the comparison ends its children too.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    options = parse()
    results = run(options)
    print(report.text(results))
    if options.out:
        report.write(results, options.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peers", type=Path, default=Path(".bench"), help="folder of the environments"
    )
    parser.add_argument("--only", action="append", choices=[OURS.name, *PEERS], default=[])
    parser.add_argument("--variant", action="append", type=variant, default=[])
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS), default=[])
    parser.add_argument("--condition", action="append", choices=list(THREADS), default=[])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--noise", type=float, default=0.1, help="foreign cores that drop a round")
    parser.add_argument("--max-wait", type=float, default=20.0, help="seconds to wait for quiet")
    parser.add_argument("--lock", type=Path, help="file to lock during each run")
    parser.add_argument("--quick", action="store_true", help="two engines, few rounds, no peers")
    parser.add_argument("--out", type=Path, help="JSON file; plots go next to it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.only = options.only or [OURS.name, *QUICK_PEERS]
        options.workload = options.workload or list(QUICK_WORKLOADS)
        options.condition = options.condition or ["quiet"]
        options.rounds, options.max_wait = 2, 1.0
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All conditions, one after another."""
    options.peers.mkdir(parents=True, exist_ok=True)
    chosen = [OURS, *PEERS.values()]
    if options.only:
        chosen = [engine for engine in chosen if engine.name in options.only]
    engines = [*chosen, *options.variant]
    results: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "processor": host.processor(Path("/proc/cpuinfo").read_text()),
        "python": platform.python_version(),
        "dtype": options.dtype,
        "noise": options.noise,
        "agreement": check_tokens(options.peers),
        "conditions": {},
    }
    for condition in options.condition or ["quiet", "shared"]:
        results["conditions"][condition] = _condition(condition, engines, options)
    return results


def _condition(
    condition: str, engines: Sequence[Engine], options: argparse.Namespace
) -> dict[str, Any]:
    missing: dict[str, str] = {}
    workloads = [WORKLOADS[name] for name in options.workload or WORKLOADS]
    with ExitStack() as closing:
        ours = closing.enter_context(host.busy_core(wanted=condition != "quiet"))
        children = {}
        for engine in engines:
            if not any(workload.name in engine.workloads for workload in workloads):
                continue
            print(f"{condition}: loading {engine.name}", flush=True)
            try:
                children[engine.name] = _load(engine, THREADS[condition], options, ours, closing)
            except (EngineFailed, FileNotFoundError) as error:
                missing[engine.name] = str(error)
                print(f"{condition}: without {engine.name}: {error}", flush=True)
        series = measure(
            [_contest(each, children, options, ours) for each in workloads],
            rounds=options.rounds,
            most_rounds=options.rounds if options.quick else 3 * options.rounds,
            report=partial(print, flush=True),
        )
        about = {name: child.about for name, child in children.items()}
    return {
        "threads": THREADS[condition],
        "engines": about,
        "missing": missing,
        "workloads": {each.workload.name: report.described(each) for each in series},
    }


def _load(
    engine: Engine,
    threads: int,
    options: argparse.Namespace,
    ours: set[int],
    closing: ExitStack,
) -> Child:
    python, known = interpreter(engine, options.peers), prefixes(options.peers)
    workloads = [WORKLOADS[name] for name in options.workload or WORKLOADS]
    needed = {prefix for each in workloads for prefix in each.prefixes}
    start = {
        "model": str(model_path(options.peers, engine.model)),
        "dtype": options.dtype,
        "threads": threads,
        "prefixes": {name: known[name] for name in sorted(needed)},
        "code": checkout(engine.revision, options.peers) if engine.revision else "",
    }
    child = closing.enter_context(Child(engine, python, start, ours=ours))
    child.wait()
    return child


def _contest(
    workload: Workload,
    children: Mapping[str, Child],
    options: argparse.Namespace,
    ours: set[int],
) -> Contest:
    able = {
        name: partial(_run, child, workload.output, options, ours)
        for name, child in children.items()
        if workload.name in child.engine.workloads
    }
    prompts = Prompts(seed=str(os.getpid()))
    return Contest(workload, able, partial(prompts.take, workload), noise=options.noise)


def _run(
    child: Child,
    output: int,
    options: argparse.Namespace,
    ours: set[int],
    requests: Sequence[Mapping[str, Any]],
) -> Measured:
    with _locked(options.lock):
        host.wait_until_quiet(
            limit=options.noise, ours={os.getsid(0), *ours}, max_wait_s=options.max_wait
        )
        return child.run(requests[: child.engine.at_most], output)


@contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Hold an exclusive lock on a file: others who measure on this machine wait meanwhile."""
    with contextlib.nullcontext() if path is None else path.open("a") as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
