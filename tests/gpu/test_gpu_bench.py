"""The whole of `make gpu-bench` on a tiny model on a CPU, and its arithmetic."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.gpu import __main__, attention, decode, parts, peer
from benchmarks.gpu.decode import Rows, described
from benchmarks.gpu.parts import Bench, Plan, claims
from benchmarks.gpu.serving import Workload, rate_between
from benchmarks.gpu.sizes import ModelSize, make_paged
from benchmarks.gpu.timing import Budget, alternating
from prefixd.server.model.paged_mlp import PagedDense
from tests.model.fake_graph import FakeGraph

CPU = torch.device("cpu")
TINY = ModelSize(2, 64, 4, 2, 16, 96, 97, context=512)
PLAN = Plan(
    size=TINY,
    few_layers=1,
    grid=((4, 64), (1, 64)),
    eager=((4, 64),),
    sharing=(Rows(4, 288, shared=256), Rows(4, 288)),
    mixing=Workload(requests=4, prompt=6, output=4),
    many=Workload(requests=4, prompt=8, output=6),
    copied=1 << 16,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bench(monkeypatch: pytest.MonkeyPatch, *, budget: float) -> Bench:
    monkeypatch.setattr(parts, "ROUNDS", 1)
    monkeypatch.setattr(decode, "STEPS", 3)
    monkeypatch.setattr(attention, "REPEATS", 1)

    def peer_result(*_: object, **__: object) -> dict[str, object]:
        return {"tokens_per_s": 10.0}

    monkeypatch.setattr(peer, "measure_apart", peer_result)
    made = Bench(CPU, budget=budget, write=lambda _: None, plan=PLAN, new_graphs=lambda: FakeGraph)
    made.run()
    return made


def test_every_part_gives_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    report = bench(monkeypatch, budget=500).report
    assert report["errors"] == {}
    assert report["dropped"] == []
    assert {"device", "date", "commit", "versions"} <= report.keys()
    part = report["parts"]
    cases = {"4 x 64", "1 x 64", "eager 4 x 64"}
    assert part["decode"].keys() == part["few layers, decode"].keys() == cases
    figures = {"ms_a_step", "tokens_per_s", "share_of_floor"}
    assert all(each.keys() == figures for each in part["decode"].values())
    assert part["attention"].keys() == {"us_a_layer", "share_of_bytes"}
    assert {"shared", "own", "own, attention", "times_faster"} <= part["sharing"].keys()
    assert part["mixing"].keys() == {"w1_tokens_per_s", "w3_tokens_per_s", "w3_over_w1"}
    assert part["engine"]["positions"] == 11
    assert set(part["varlen"]) == {"pages of 16", "pages of 256"}
    assert all("missing" in each for each in part["varlen"].values())  # no kernel for a CPU
    assert part["transformers"]["times_slower"] == pytest.approx(
        part["mixing"]["w1_tokens_per_s"] / 10, abs=1e-3
    )
    measured = {claim: each["measured"] for claim, each in report["claims"].items()}
    assert [value is None for value in measured.values()] == [True, True, False, False, True]


def test_parts_that_the_budget_does_not_allow_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    report = bench(monkeypatch, budget=6).report
    assert report["parts"].keys() == {"copy"}
    assert report["dropped"] == ["model", "transformers", "few layers, model"]


def test_a_part_that_fails_is_reported_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "make_paged", lambda *_, **__: 1 / 0)
    report = bench(monkeypatch, budget=500).report
    assert report["errors"].keys() == {"model", "few layers, model"}
    assert "ZeroDivisionError" in report["errors"]["model"]
    assert report["parts"].keys() == {"copy", "transformers"}


class Clock:
    """A clock that moves when a case runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def case(self, seconds: float) -> Callable[[], float]:
        def run() -> float:
            self.now += seconds
            return self.now

        return run


def test_cases_that_do_not_fit_the_budget_are_dropped() -> None:
    """Two rounds: a, 1 s each, and c fit the budget; b would exceed it."""
    clock = Clock()
    cases = {"a": clock.case(1), "b": clock.case(3), "broken": lambda: 1 / 0, "c": clock.case(0.5)}
    budget = Budget(8, clock)
    medians, dropped = alternating(cases, rounds=2, budget=budget)
    assert dropped == ["b", "broken: ZeroDivisionError: division by zero"]
    assert medians == {"a": pytest.approx((5.5 + 7) / 2), "c": pytest.approx((6 + 7.5) / 2)}
    assert budget.left == pytest.approx(0.5)
    assert budget.part(3).left == pytest.approx(0.5)


def test_bytes_of_a_step_are_those_of_the_weights_and_the_pool() -> None:
    decoder = make_paged(TINY, CPU, num_blocks=8, max_rows=4)
    weights = decoder.weights
    tensors = [weights.final_norm, weights.head.weight]
    for layer in weights.layers:
        assert isinstance(layer.mlp, PagedDense)
        tensors += [layer.input_norm, layer.post_norm, layer.qkv.weight, layer.o.weight]
        tensors += [layer.mlp.gate_up.weight, layer.mlp.down.weight]
    assert TINY.weight_bytes == sum(2 * tensor.numel() for tensor in tensors)
    pool = decoder.cache.pool
    assert TINY.position_bytes * 9 * 16 == pool.numel() * pool.itemsize


def test_share_of_the_floor() -> None:
    size, rate = parts.PLAN.size, 4e12
    assert size.weight_bytes == pytest.approx(15.01e9, rel=1e-3)
    assert size.position_bytes == 131_072
    rows = Rows(64, 1024)
    floor = (size.weight_bytes + 64 * 1016 * 131_072) / rate
    figures = described(size, rows, 2 * floor, rate)
    assert figures["share_of_floor"] == 0.5
    assert figures["tokens_per_s"] == round(64 / (2 * floor), 1)
    shared = described(size, Rows(64, 1088, shared=1024), 1.0, rate)
    once = (size.weight_bytes + (1024 + 64 * 56) * 131_072) / rate
    assert shared["share_of_floor"] == round(once, 4)


def test_rows_share_the_blocks_of_their_prefix_alone() -> None:
    rows = Rows(3, 300, shared=256)
    [*_, last] = rows.steps(4)
    tables = [chunk.block_table for chunk in last.chunks]
    assert {table[:16] for table in tables} == {tuple(range(1, 17))}
    own = [block for table in tables for block in table[16:]]
    assert len(own) == len(set(own)) == 9
    assert rows.num_blocks == 1 + max(own)
    assert [chunk.start for chunk in last.chunks] == [299] * 3


def test_the_rate_counts_from_the_last_beginning_to_the_first_end() -> None:
    assert rate_between([[0, 1, 2, 3, 4], [1, 2, 3]]) == 2
    with pytest.raises(ValueError, match="never decoded all at once"):
        rate_between([[0, 1], [2, 3]])


def test_a_claim_holds_by_its_figure() -> None:
    held = claims(
        {"mixing": {"w3_over_w1": 0.98}, "decode": {"64 x 1024": {"share_of_floor": 0.7}}}
    )
    assert [each["holds"] for each in held.values()] == [None, False, True, None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_bench_without_a_gpu_prints_a_message_and_exits_with_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu"])
    assert __main__.main() == 0
    assert "skipped, torch finds no CUDA device" in capsys.readouterr().out
