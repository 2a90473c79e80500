"""Decode steps of the native decoder against the packed products of torch, in alternating rounds.

Random bfloat16 weights in the sizes of the demo model::

    python -m benchmarks.cpu_kernels --threads 2 --kernels avx512_bf16 --rows 1 8 32

With ``--next-to-busy``: against its own steps on one thread, while another process keeps one core
busy. With ``--int8``: steps with int8 layers against its own in bfloat16; without the head by
``--layers-only``.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from prefixd.server.model.cpu import interface
from prefixd.server.model.cpu.library import NativeLibrary, find_or_compile_library

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, VOCAB = 30, 9, 3, 64, 576, 1536, 49152
BLOCK, POSITIONS = 16, 2048
BUSY_BLOCK_S = 2.0
"""Of steps next to a busy process: the pool tries a thread again at least so often."""


class Steps:
    """A decoder with random weights, and decode steps of it."""

    def __init__(
        self, library: NativeLibrary, kernels: str, threads: int, rows: int, *, int8: bool = False
    ) -> None:
        self.call = library.functions
        self.arrays: list[dict[str, torch.Tensor]] = []
        """Of all steps: they hold addresses only."""
        shape = interface.Shape(
            interface.BF16, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB, VOCAB, HEAD_DIM,
            POSITIONS, BLOCK, 1e-5, HEAD_DIM**-0.5,
        )  # fmt: skip
        self.decoder = self.call.pfx_new(ctypes.byref(shape), interface.KERNELS.index(kernels))
        if not self.decoder:
            raise SystemExit(library.error())
        self.call.pfx_set_threads(self.decoder, threads, 200)
        self._set_weights(int8=int8)
        self.call.pfx_set_pool(self.decoder, 1 + rows * (POSITIONS // BLOCK))

    def _set_weights(self, *, int8: bool) -> None:
        def weight(*size: int) -> torch.Tensor:
            return torch.randn(*size, dtype=torch.bfloat16) * 0.02

        def linear(matrix: torch.Tensor) -> interface.Linear:
            if matrix is head or not int8:
                return interface.Linear(matrix.data_ptr(), None)
            scales = matrix.float().abs().amax(1) / 127
            codes = (matrix.float() / scales[:, None]).round().to(torch.int8)
            kept.extend((scales, codes))
            return interface.Linear(codes.data_ptr(), None, scales.data_ptr())

        kept: list[torch.Tensor] = []
        ones, table = torch.ones(WIDTH, dtype=torch.bfloat16), torch.ones(POSITIONS, HEAD_DIM // 2)
        queries, keys = weight(HEADS * HEAD_DIM, WIDTH), weight(KV_HEADS * HEAD_DIM, WIDTH)
        gate, down, head = weight(INNER, WIDTH), weight(WIDTH, INNER), weight(VOCAB, WIDTH)
        self.call.pfx_set_rotary(self.decoder, table.data_ptr(), table.data_ptr())
        layer = interface.Layer(
            input_norm=ones.data_ptr(), post_norm=ones.data_ptr(), inner=INNER,
            q=linear(queries), k=linear(keys), v=linear(keys), o=linear(queries),
            gate=linear(gate), up=linear(gate), down=linear(down),
        )  # fmt: skip
        for i in range(LAYERS):
            self.call.pfx_set_layer(self.decoder, i, ctypes.byref(layer))
        ends = ctypes.byref(linear(head))
        self.call.pfx_set_ends(self.decoder, ones.data_ptr(), ends, None)

    def step(self, rows: int, position: int, *, head: bool = True) -> Callable[[], None]:
        """A step of ``rows`` sequences, each with a token at ``position``; with the head or not."""
        width = POSITIONS // BLOCK
        order = torch.arange(rows, dtype=torch.int32)
        arrays = {
            "token_ids": order + 5, "offsets": order, "lengths": torch.ones_like(order),
            "starts": torch.full_like(order, position), "outputs": order,
            "tables": 1 + torch.arange(rows * width, dtype=torch.int32),
            "logits": torch.empty(rows, VOCAB), "best": torch.empty_like(order),
            "best_value": torch.empty(rows),
        }  # fmt: skip
        step = interface.Step(
            num_tokens=rows, num_rows=rows, num_outputs=rows if head else 0, table_width=width,
            candidates=VOCAB,
            **{name: array.data_ptr() for name, array in arrays.items()},
        )  # fmt: skip

        self.arrays.append(arrays)

        def run() -> None:
            if self.call.pfx_run(self.decoder, ctypes.byref(step)):
                raise SystemExit(self.call.pfx_error().decode())

        return run


def packed_products(rows: int) -> Callable[[], None]:
    """All products of one decode step with torch's packed weights."""
    ops = torch.ops.mkldnn
    layer = [(960, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)]
    sizes = [*layer * LAYERS, (VOCAB, WIDTH)]
    weights = [torch.randn(*size, dtype=torch.bfloat16) for size in sizes]
    packed = [(w.shape[1], ops._reorder_linear_weight(w, rows)) for w in weights]  # noqa: SLF001
    inputs = {k: torch.randn(rows, k, dtype=torch.bfloat16) for k in (WIDTH, INNER)}

    def run() -> None:
        for inner, weight in packed:
            ops._linear_pointwise(inputs[inner], weight, None, "none", [], "")  # noqa: SLF001

    return run


def seconds_of(run: Callable[[], None], least: float) -> float:
    """The mean time of as many runs as take ``least`` seconds together, or of one."""
    start = time.perf_counter()
    count = 0
    while count == 0 or time.perf_counter() - start < least:
        run()
        count += 1
    return (time.perf_counter() - start) / count


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def print_ratios(
    rows: list[int],
    rounds: int,
    ours: Callable[[int], Callable[[], None]],
    other: Callable[[int], Callable[[], None]],
    *,
    least: float = 0.0,
) -> None:
    """Medians of both in alternating rounds, without the first, and their ratio. A round is one run
    of each, or as many as take ``least`` seconds."""
    with torch.inference_mode():
        for count in rows:
            runs = ours(count), other(count)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds):
                for run, values in zip(runs, times, strict=True):
                    values.append(1e3 * seconds_of(run, least))
            first, second = (statistics.median(values[1:]) for values in times)
            print(f"{count:5} {first:8.2f} {second:8.2f} {first / second:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", default="")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--position", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    parser.add_argument("--next-to-busy", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--layers-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(exist_ok=True)
    library = find_or_compile_library(arguments.folder)
    kernels = arguments.kernels or library.kernels[-1]

    def steps(threads: int, *, int8: bool = False) -> Callable[[int], Callable[[], None]]:
        decoder = Steps(library, kernels, threads, max(arguments.rows), int8=int8)
        return lambda rows: decoder.step(rows, arguments.position, head=not arguments.layers_only)

    title = f"{kernels}, {arguments.threads} threads, ms: rows, step"
    if arguments.next_to_busy:
        print(f"{title}, step on one thread, ratio; next to a busy process")
        with busy_process():
            runs = steps(arguments.threads), steps(1)
            print_ratios(arguments.rows, arguments.rounds, *runs, least=BUSY_BLOCK_S)
    elif arguments.int8:
        print(f"{title} with int8 layers, step in bfloat16, ratio")
        ours, other = (steps(arguments.threads, int8=int8) for int8 in (True, False))
        print_ratios(arguments.rows, arguments.rounds, ours, other)
    else:
        print(f"{title}, torch's products, ratio")
        print_ratios(arguments.rows, arguments.rounds, steps(arguments.threads), packed_products)


if __name__ == "__main__":
    main()
