"""The parts of the measurement and their report."""

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu import attention, peer, serving
from benchmarks.gpu.decode import Rows, decode_case, described
from benchmarks.gpu.serving import Workload
from benchmarks.gpu.sizes import BLOCK, ModelSize, make_paged
from benchmarks.gpu.timing import Budget, alternating, copy_rate
from prefixd.server.model.graphs import Graph, cuda_graphs
from prefixd.server.model.paged import PagedDecoder
from tests.gpu.check import machine

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured. ``grid`` begins with the cases that matter most."""

    size: ModelSize
    few_layers: int
    grid: tuple[tuple[int, int], ...]
    eager: tuple[tuple[int, int], ...]
    sharing: tuple[Rows, Rows]
    mixing: Workload
    many: Workload
    copied: int
    page: int = 256

    @property
    def max_rows(self) -> int:
        """The most rows of a step."""
        return max(rows for rows, _ in self.grid)


PLAN = Plan(
    size=ModelSize(32, 4096, 32, 8, 128, 14_336, 128_256, context=4096),
    few_layers=8,
    grid=(
        *((64, 1024), (1, 1024), (16, 1024), (128, 1024), (64, 4096), (128, 512)),
        *((1, 512), (16, 512), (64, 512), (1, 4096), (16, 4096), (128, 4096)),
    ),
    eager=((64, 1024), (1, 1024), (16, 1024), (128, 1024)),
    sharing=(Rows(64, 1088, shared=1024), Rows(64, 1088)),
    mixing=Workload(requests=32, prompt=64, output=64),
    many=Workload(requests=64, prompt=896, output=128),
    copied=4 << 30,
)
"""A Llama of 8 billion weights."""

CLAIMS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "without graphs 64 rows at 1,024 positions reach 35 % of the floor": (
        ("decode", "eager 64 x 1024", "share_of_floor"),
        0.35,
    ),
    "with graphs and lean layers they reach 80 %": (
        ("decode", "64 x 1024", "share_of_floor"),
        0.80,
    ),
    "32 soft prompts cost at most 3 % (W3/W1)": (("mixing", "w3_over_w1"), 0.97),
    "twice the continuous batching of transformers (W1)": (("transformers", "times_slower"), 2.0),
    "attention is no slower than torch's with a block table": (("varlen", "times_slower"), 1.0),
}
"""Where the report has the figure, and what it should be at least."""


class Bench:
    """Measures all parts of a plan on a device, and keeps the ``report``."""

    def __init__(
        self,
        device: torch.device,
        *,
        budget: float,
        write: Callable[[Mapping[str, Any]], None],
        plan: Plan = PLAN,
        new_graphs: Callable[[], Callable[[], Graph]] = cuda_graphs,
    ) -> None:
        """``write`` gets the report after each part."""
        self._device, self._write, self._plan = device, write, plan
        self._budget, self._new_graphs = Budget(budget), new_graphs
        self.report: dict[str, Any] = machine() | {
            "parts": {}, "seconds": {}, "dropped": [], "errors": {}, "claims": {}
        }  # fmt: skip
        self._rate, self._name = 0.0, ""
        self._decoder: PagedDecoder | None = None

    def run(self) -> None:
        """Measure one part after the other."""
        plan = self._plan
        self._part("copy", self._copy, least=5)
        if not self._rate:
            return
        self._part("model", lambda: self._load(plan.size), least=30)
        if self._decoder is not None:
            self._part("attention", self._attention, least=10)
            self._part("decode", lambda: self._decode(plan.size, 50), least=15)
            self._part("mixing", self._mixing, least=15)
            self._part("engine", self._engine, least=10)
            self._part("sharing", self._sharing, least=10)
            self._part("varlen", self._varlen, least=5)
        self._free()
        self._part("transformers", self._transformers, least=20)
        few = replace(plan.size, layers=plan.few_layers)
        self._part("few layers, model", lambda: self._load(few), least=20)
        if self._decoder is not None:
            self._part("few layers, decode", lambda: self._decode(few, 40), least=10)
        self._free()

    def _part(self, name: str, run: Callable[[], dict[str, Any]], *, least: float) -> None:
        """Run a part that needs at least ``least`` seconds, if they are left."""
        if self._budget.left < least:
            self.report["dropped"].append(name)
            return
        self._name, started = name, time.perf_counter()
        try:
            self.report["parts"][name] = run()
        except Exception as error:  # noqa: BLE001 - the other parts still tell something
            trace = traceback.format_exc(limit=-4)
            self.report["errors"][name] = f"{type(error).__name__}: {error}\n{trace}"[-2500:]
        self.report["seconds"][name] = round(time.perf_counter() - started, 1)
        self.report["claims"] = claims(self.report["parts"])
        self._write(self.report)

    def _copy(self) -> dict[str, Any]:
        self._rate = copy_rate(self._device, self._plan.copied)
        self._free()
        return {"bytes_per_s": self._rate}

    def _load(self, size: ModelSize) -> dict[str, Any]:
        """Make the model, and capture its graphs."""
        plan, started = self._plan, time.perf_counter()
        self._num_blocks = max(
            *(rows.num_blocks for rows in self._fitting(size)),
            *(rows.num_blocks for rows in plan.sharing),
        )
        self._decoder = make_paged(
            size, self._device, num_blocks=self._num_blocks, max_rows=plan.max_rows
        )
        made = time.perf_counter()
        self._new_graph = self._new_graphs()
        self._decoder.capture(plan.max_rows, new_graph=self._new_graph)
        self._graphs = self._decoder._graphs  # noqa: SLF001 - switched off for some cases
        return {
            "weight_bytes": size.weight_bytes,
            "pool_blocks": self._num_blocks,
            "seconds_to_make": round(made - started, 1),
            "seconds_to_capture": round(time.perf_counter() - made, 1),
        }

    def _fitting(self, size: ModelSize) -> list[Rows]:
        """Cases of the grid whose KV fits the device next to the weights twice."""
        room = float("inf")
        if self._device.type == "cuda":
            room = 0.85 * torch.cuda.mem_get_info(self._device)[0] - 1.3 * size.weight_bytes
        cases = [Rows(*each) for each in self._plan.grid]
        block = BLOCK * size.position_bytes
        fitting = [rows for rows in cases if rows.num_blocks * block <= room]
        too_large = [f"{rows.rows} x {rows.positions}" for rows in cases if rows not in fitting]
        self.report["dropped"] += [f"{name}: no room for its KV" for name in too_large]
        return fitting

    def _decode(self, size: ModelSize, seconds: float) -> dict[str, Any]:
        """Steady decode steps, with graphs and without."""
        decoder = self._required()
        fitting = [Rows(*each) for each in self._plan.grid]
        fitting = [rows for rows in fitting if rows.num_blocks <= self._num_blocks]
        eager = [rows for rows in fitting if (rows.rows, rows.positions) in self._plan.eager]
        cases = {f"{rows.rows} x {rows.positions}": (rows, self._graphs) for rows in fitting[:4]}
        cases |= {f"eager {rows.rows} x {rows.positions}": (rows, None) for rows in eager}
        cases |= {f"{rows.rows} x {rows.positions}": (rows, self._graphs) for rows in fitting}
        medians = self._alternating(
            {name: decode_case(decoder, rows, graphs) for name, (rows, graphs) in cases.items()},
            seconds,
        )
        return {
            name: described(size, cases[name][0], each, self._rate)
            for name, each in medians.items()
        }

    def _attention(self) -> dict[str, Any]:
        """One layer's attention at the first case of the grid."""
        plan = self._plan
        rows = Rows(*plan.grid[0])
        case = attention.attention_case(self._required(), rows, self._new_graph)
        medians = self._alternating({"attention": case}, 10)
        if not medians:
            return {}
        seconds = medians["attention"]
        num_bytes = rows.rows * rows.positions * plan.size.position_bytes / plan.size.layers
        return {
            "us_a_layer": round(1e6 * seconds, 2),
            "share_of_bytes": round(num_bytes / self._rate / seconds, 4),
        }

    def _sharing(self) -> dict[str, Any]:
        """Rows under one prefix, against rows with as many positions of their own."""
        shared, own = self._plan.sharing
        decoder, size = self._required(), self._plan.size
        medians = self._alternating(
            {
                "shared": decode_case(decoder, shared, self._graphs),
                "own": decode_case(decoder, own, self._graphs),
                "shared, attention": attention.attention_case(decoder, shared, self._new_graph),
                "own, attention": attention.attention_case(decoder, own, self._new_graph),
            },
            20,
        )
        result: dict[str, Any] = {
            name: described(size, rows, medians[name], self._rate)
            for name, rows in (("shared", shared), ("own", own))
            if name in medians
        }
        for name in ("shared, attention", "own, attention"):
            if name in medians:
                result[name] = {"us_a_layer": round(1e6 * medians[name], 2)}
        if {"shared", "own"} <= medians.keys():
            result["times_faster"] = round(medians["own"] / medians["shared"], 3)
        return result

    def _mixing(self) -> dict[str, Any]:
        """W1 and W3 through the engine: the same requests on the base and under soft prompts."""
        load = self._plan.mixing
        with self._serving() as served:
            prefixes = serving.soft_prompts(served, load)
            medians = self._alternating(
                {
                    "w1": lambda: serving.output_rate(served, load, []),
                    "w3": lambda: serving.output_rate(served, load, prefixes),
                },
                30,
            )
        result = {f"{name}_tokens_per_s": round(rate, 1) for name, rate in medians.items()}
        if len(medians) == 2:
            result["w3_over_w1"] = round(medians["w3"] / medians["w1"], 4)
        return result

    def _engine(self) -> dict[str, Any]:
        """Many sequences that decode through the engine, at the end of their positions."""
        load = self._plan.many
        with self._serving() as served:
            case = {"engine": lambda: serving.steady_rate(served, load)}
            medians = self._alternating(case, 30, rounds=min(3, ROUNDS))  # one takes seconds
        if not medians:
            return {}
        rate = medians["engine"]
        positions = load.prompt + load.output / 2
        floor = self._plan.size.floor(load.requests, positions, self._rate)
        return {
            "requests": load.requests,
            "positions": positions,
            "tokens_per_s": round(rate, 1),
            "share_of_floor": round(floor * rate / load.requests, 4),
        }

    def _varlen(self) -> dict[str, Any]:
        """torch's attention next to ours."""
        rows, decoder = Rows(*self._plan.grid[0]), self._required()
        result: dict[str, Any] = {}
        ours = attention.attention_case(decoder, rows, self._new_graph)
        for page in (BLOCK, self._plan.page):
            try:
                theirs = attention.varlen_case(decoder, rows, self._new_graph, page=page)
            except attention.NoVarlen as reason:
                result[f"pages of {page}"] = {"missing": str(reason)}
                continue
            medians = self._alternating({"ours": ours, f"theirs, pages of {page}": theirs}, 10)
            if len(medians) < 2:
                continue
            mine, other = medians.values()
            result[f"pages of {page}"] = {"us_a_layer": round(1e6 * other, 2)}
            faster = min(other / mine, result.get("times_slower", other / mine))
            result["times_slower"] = round(faster, 3)
        return result

    def _transformers(self) -> dict[str, Any]:
        """Continuous batching of transformers on W1."""
        plan = self._plan
        timeout = min(60.0, self._budget.left)
        result = peer.measure_apart(plan.size, plan.mixing, self._device, timeout=timeout)
        ours = self.report["parts"].get("mixing", {}).get("w1_tokens_per_s")
        if "tokens_per_s" in result and ours:
            result["times_slower"] = round(ours / result["tokens_per_s"], 3)
        return result

    def _serving(self) -> Any:
        decoder = self._required()
        decoder._graphs = self._graphs  # noqa: SLF001 - may have been switched off
        return serving.running(decoder, num_blocks=self._num_blocks, max_rows=self._plan.max_rows)

    def _alternating(
        self,
        cases: Mapping[str, Callable[[], float]],
        seconds: float,
        *,
        rounds: int | None = None,
    ) -> dict[str, float]:
        budget = self._budget.part(seconds)
        medians, dropped = alternating(cases, rounds=rounds or ROUNDS, budget=budget)
        self.report["dropped"] += [f"{self._name}, {each}" for each in dropped]
        return medians

    def _required(self) -> PagedDecoder:
        assert self._decoder is not None
        return self._decoder

    def _free(self) -> None:
        """Give the memory of the model back."""
        self._decoder = self._graphs = self._new_graph = None  # type: ignore[assignment]
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def claims(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Which claims hold, by the figures that are there."""
    result: dict[str, Any] = {}
    for claim, (path, least) in CLAIMS.items():
        value: Any = parts
        for name in path:
            value = value.get(name, {})
        measured = value if isinstance(value, float | int) else None
        holds = None if measured is None else measured >= least
        result[claim] = {"at_least": least, "measured": measured, "holds": holds}
    return result
