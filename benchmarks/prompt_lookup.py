"""What prompt lookup gains: one server with ``--speculate ngram``, requests with and without.

``python -m benchmarks.prompt_lookup [--rounds 5] [--threads 2] [--out results.json]``

Four kinds of text, on 1 and on 8 streams at once: a text to repeat, JSON to extract, a greedy chat,
and a chat sampled at temperature 1 with a seed, which hardly repeats itself. Answers end where the
model ends them, at most after 128 tokens. Both ways alternate in each round with the same prompts,
fresh in each round; the first round is not counted, and one is dropped in which other processes
used more than ``--noise`` cores. Medians; the texts of both are compared, and counted where they
are not the same: in bfloat16 a row's rounding depends on the number of rows.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import host
from benchmarks.serving import MODEL, BenchServer, client, figures, serving, write

OUTPUT = 128
STREAMS = (1, 8)

_NAMES = ("Anna Berger", "Tomas Lind", "Mei Tanaka", "Ruth Okafor", "Ivo Marin", "Lena Sorel")
_PLACES = ("town hall", "old harbour", "north bridge", "market square", "railway yard")


def _minutes(number: int) -> str:
    """A short text that no other number gives."""
    name, place = _NAMES[number % len(_NAMES)], _PLACES[number % len(_PLACES)]
    return (
        f"Meeting {number} began at nine in the {place}. {name} opened it and asked for offers to "
        f"repair the roof of the {place}. The committee agreed to pay {number * 7 + 300} euros, "
        f"and {name} will write to the builders. The {place} stays open until the work begins."
    )


def _repeat(number: int) -> str:
    return f"Repeat this text word for word.\n\n{_minutes(number)}"


def _extract(number: int) -> str:
    return (
        f"{_minutes(number)}\n\nGive the name, the place, the hour, the sum in euros and the task "
        "as JSON with these keys: name, place, hour, sum, task."
    )


def _chat(number: int) -> str:
    name, place = _NAMES[number % len(_NAMES)], _PLACES[number % len(_PLACES)]
    return f"Write an unusual story about {name}, the number {number} and the {place} at night."


@dataclass(frozen=True)
class Kind:
    """A kind of text: the user's message by number, and the settings of its requests."""

    message: Callable[[int], str]
    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0})


KINDS = {
    "repeat": Kind(_repeat),
    "json": Kind(_extract),
    "chat": Kind(_chat),
    "sampled chat": Kind(_chat, {"temperature": 1.0, "seed": 7}),
}


@dataclass
class Run:
    """The requests of one round, one way."""

    seconds: float
    texts: list[str]
    tokens: int
    accepted: float
    foreign: float


async def run(
    http: httpx2.AsyncClient, server: BenchServer, kind: Kind, numbers: list[int], *, on: bool
) -> Run:
    """Send one request for each number, all at once."""
    before = await figures(http)
    meter = host.LoadMeter(measured=server.pid, ours={os.getsid(0)})
    started = time.perf_counter()
    answers = await asyncio.gather(
        *(
            http.post(
                "/v1/chat/completions",
                json={
                    "model": MODEL,
                    "messages": [{"role": "user", "content": kind.message(number)}],
                    "max_tokens": OUTPUT,
                    "kv_reuse": False,
                    "speculate": on,
                    **kind.sampling,
                },
            )
            for number in numbers
        )
    )
    seconds = time.perf_counter() - started
    load = meter.read()
    bodies = [answer.raise_for_status().json() for answer in answers]
    accepted = "prefixd_spec_decode_num_accepted_tokens_total"
    return Run(
        seconds,
        [body["choices"][0]["message"]["content"] for body in bodies],
        sum(body["usage"]["completion_tokens"] for body in bodies),
        (await figures(http))[accepted] - before[accepted],
        load.foreign + load.steal,
    )


async def measure(
    http: httpx2.AsyncClient, server: BenchServer, *, rounds: int, noise: float
) -> dict[str, Any]:
    """All kinds on all numbers of streams."""
    report: dict[str, Any] = {}
    number = os.getpid()  # other prompts in each run
    for name, kind in KINDS.items():
        for streams in STREAMS:
            pairs: list[tuple[Run, Run]] = []
            dropped = 0
            for index in range(rounds + 1):
                numbers = list(range(number, number + streams))
                number += streams
                order = (True, False) if index % 2 else (False, True)
                runs = {on: await run(http, server, kind, numbers, on=on) for on in order}
                if index == 0:
                    continue
                if max(each.foreign for each in runs.values()) > noise:
                    dropped += 1
                    continue
                pairs.append((runs[True], runs[False]))
            report[f"{name}, {streams}"] = {"dropped": dropped, **_summary(pairs)}
            print(f"{name}, {streams} streams: {report[f'{name}, {streams}']}", flush=True)
    return report


def _summary(pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    if not pairs:
        return {}
    rates = [(on.tokens / on.seconds, off.tokens / off.seconds) for on, off in pairs]
    tokens, accepted = sum(on.tokens for on, _ in pairs), sum(on.accepted for on, _ in pairs)
    texts = [same for on, off in pairs for same in zip(on.texts, off.texts, strict=True)]
    return {
        "rounds": len(pairs),
        "tokens_per_s": {
            "on": round(statistics.median(on for on, _ in rates), 1),
            "off": round(statistics.median(off for _, off in rates), 1),
        },
        "ratio": round(statistics.median(on / off for on, off in rates), 3),
        "tokens_a_step": round(tokens / (tokens - accepted), 2),
        "different_texts": sum(on != off for on, off in texts),
        "texts": len(texts),
    }


async def _report(server: BenchServer, key: str, options: argparse.Namespace) -> dict[str, Any]:
    async with client(server.url, key) as http:
        return await measure(http, server, rounds=options.rounds, noise=options.noise)


def main() -> None:
    """Measure, print the figures and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flags = ("--dtype", options.dtype, "--threads", str(options.threads), "--speculate", "ngram")
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch) / "data", *flags) as (server, keys),
    ):
        report = asyncio.run(_report(server, keys["bench"], options))
    report = {
        "machine": host.processor(Path("/proc/cpuinfo").read_text()),
        "dtype": options.dtype,
        "threads": options.threads,
        **report,
    }
    print(json.dumps(report, indent=2))
    write(options.out, report)


if __name__ == "__main__":
    main()
