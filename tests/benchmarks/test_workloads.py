"""What engines are asked, and how their figures are read."""

from itertools import islice

import pytest

from benchmarks.workloads import WORKLOADS, Prompts, figure_of, rotations

BLOCK = 16


def test_no_prompt_of_a_run_begins_like_another():
    prompts = Prompts(seed="test")
    beginnings = [
        tuple(request["tokens"][:BLOCK])
        for _ in range(6)
        for workload in WORKLOADS.values()
        for request in prompts.take(workload)
    ]
    assert len(set(beginnings)) == len(beginnings)


def test_a_workload_asks_for_its_lengths_and_prefixes():
    requests = Prompts().take(WORKLOADS["W4"])
    assert [len(request["tokens"]) for request in requests] == [64] * 32
    assert [requests[i]["prefix"] for i in (0, 7, 8)] == ["kv-0", "kv-7", "kv-0"]
    assert len({each["prefix"] for each in Prompts().take(WORKLOADS["W3"])}) == 32
    assert {each["prefix"] for each in Prompts().take(WORKLOADS["W1"])} == {None}


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("W1", [0.5] * 4, 4 * 64 / 2.0),
        ("one", [0.73], 1000 * (2.0 - 0.73) / 127),
        ("one", [], 1000 * 2.0 / 128),
        ("long", [2.0], 2.0),
    ],
)
def test_figures(name: str, first: list[float], expected: float):
    figure = figure_of(WORKLOADS[name], seconds=2.0, first=first, served=len(first) or 1)
    assert figure == pytest.approx(expected)


def test_in_the_rounds_every_engine_takes_every_place_and_follows_every_other():
    orders = list(islice(rotations(["a", "b", "c"]), 6))
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_a_single_engine_alternates_with_itself():
    assert list(islice(rotations(["a"]), 3)) == [["a"]] * 3
