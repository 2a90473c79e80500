"""Which rounds count."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

from benchmarks import report
from benchmarks.children import EngineFailed, Measured
from benchmarks.host import Load
from benchmarks.rounds import Contest, Series, measure, median
from benchmarks.workloads import WORKLOADS, Prompts

W1 = WORKLOADS["W1"]


class Script:
    """An engine whose runs take the given seconds, with the given foreign load."""

    def __init__(self, name: str, seconds: Sequence[float], foreign: Sequence[float] = ()) -> None:
        self.name = name
        self.requests: list[Any] = []
        self._seconds, self._foreign = list(seconds), list(foreign)

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> Measured:
        number = len(self.requests)
        self.requests.append(requests)
        if number == len(self._seconds):
            raise EngineFailed(f"{self.name}: out of memory")
        foreign = self._foreign[number] if number < len(self._foreign) else 0.0
        seconds = self._seconds[number]
        load = Load(wall=seconds, cpu=2 * seconds, foreign=foreign, steal=0.0)
        return Measured(seconds, [0.1] * 32, [[1] * 64] * len(requests), load)


def rounds(*engines: Script, counting: int = 2, most: int = 6) -> Series:
    prompts = Prompts()
    runners: dict[str, Callable[..., Measured]] = {each.name: each for each in engines}
    contest = Contest(W1, runners, lambda: prompts.take(W1), noise=0.1)
    return measure([contest], rounds=counting, most_rounds=most)[0]


def test_the_first_round_is_not_counted():
    series = rounds(Script("prefixd", [100.0, 2.0, 4.0]))
    assert series.figures("prefixd") == [1024.0, 512.0]


def test_a_noisy_run_drops_the_round_of_all_engines():
    ours = Script("prefixd", [1.0, 2.0, 4.0, 8.0])
    other = Script("other", [1.0] * 4, foreign=[0.0, 0.0, 0.3, 0.0])
    series = rounds(ours, other)
    assert series.figures("prefixd") == [1024.0, 256.0]
    assert [each.noisy for each in series.dropped] == [["other"]]


def test_noise_ends_after_the_most_rounds():
    series = rounds(Script("prefixd", [1.0] * 9, foreign=[0.2] * 9), most=3)
    assert (len(series.counted), len(series.dropped)) == (0, 3)
    assert report.described(series)["engines"] == {}


def test_all_engines_of_a_round_get_the_same_new_requests():
    ours, other = Script("prefixd", [1.0] * 3), Script("other", [1.0] * 3)
    rounds(ours, other)
    assert ours.requests == other.requests
    assert ours.requests[0] != ours.requests[1] != ours.requests[2]


def test_an_engine_that_fails_does_not_stop_the_others():
    series = rounds(Script("other", [1.0]), Script("prefixd", [1.0] * 3))
    assert len(series.counted) == 2
    described = report.described(series)
    assert list(described["engines"]) == ["prefixd"]
    assert described["failed"] == {"other": "other: out of memory"}


def test_ratios_are_medians_of_rounds_and_not_ratios_of_medians():
    ours, other = Script("prefixd", [1.0, 1.0, 4.0, 4.0]), Script("other", [1.0, 2.0, 4.0, 12.0])
    described = report.described(rounds(ours, other, counting=3))
    assert described["engines"]["other"]["ours_faster"] == 2.0
    assert described["engines"]["other"]["values"] == [1024.0, 512.0, pytest.approx(170.7)]


def test_cpu_seconds_are_those_of_all_requests():
    def half(requests: Sequence[Mapping[str, Any]]) -> Measured:
        return Script("half", [3.0])(requests[:16])

    prompts = Prompts()
    contest = Contest(W1, {"half": half}, lambda: prompts.take(W1), noise=0.1)
    (series,) = measure([contest], rounds=1, most_rounds=1)
    assert series.cpu_seconds("half") == [12.0]
    assert series.figures("half") == [16 * 64 / 3.0]


def test_workloads_alternate_until_each_has_its_rounds():
    lines: list[str] = []
    contests = []
    for name, foreign in (("W1", [0.0, 0.5, 0.0]), ("W3", [0.0] * 3)):
        workload = WORKLOADS[name]
        runners = {"prefixd": Script("prefixd", [1.0] * 5, foreign)}
        prompts = partial(Prompts().take, workload)
        contests.append(Contest(workload, runners, prompts, noise=0.1))
    measure(contests, rounds=1, most_rounds=5, report=lines.append)
    labels = [line.partition(":")[0] for line in lines]
    assert labels == ["W1 warm-up", "W3 warm-up", "W1 round 1", "W3 round 1", "W1 round 2"]
    assert "2048*" in lines[2]


def test_the_median_of_nothing_is_none():
    assert (median([]), median([3.0, 1.0, 2.0])) == (None, 2.0)


def test_the_table_names_what_is_missing_and_what_failed():
    series = rounds(Script("prefixd", [1.0] * 3), Script("other", [1.0]))
    results: dict[str, Any] = {
        "processor": {
            "name": "EPYC", "vendor": "AMD", "family": "25", "model": "17", "cores": 2,
            "kernels": ["AVX2"],
        },
        "dtype": "bfloat16",
        "date": "2026-11-29",
        "conditions": {
            "quiet": {
                "threads": 2,
                "engines": {"prefixd": {"version": "0.1"}, "other": {}},
                "missing": {"vllm": "vllm: no such folder"},
                "workloads": {"W1": report.described(series)},
            }
        },
    }  # fmt: skip
    with_prefixes = rounds(Script("prefixd", [1.0, 1.25, 1.25]))
    results["conditions"]["quiet"]["workloads"]["W3"] = report.described(with_prefixes)
    text = report.text(results)
    assert "| prefixd 0.1 | 2048 (1.00x, 2 s) | 1638 (1.00x, 2.5 s) |" in text
    assert "| other  | - | - |" in text
    assert "prefixd: W3/W1 0.800" in text
    assert "missing: vllm: no such folder" in text
    assert "failed in W1: other: out of memory" in text
