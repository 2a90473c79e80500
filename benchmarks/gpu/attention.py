"""The attention kernels alone, and torch's own next to them, all layers in one graph."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.decode import Rows
from benchmarks.gpu.timing import seconds_of
from prefixd.server.model.buffers import StepTensors
from prefixd.server.model.graphs import Graph
from prefixd.server.model.paged import PagedDecoder, attend_step

NewGraph = Callable[[], Graph]
REPEATS = 10


def attention_case(decoder: PagedDecoder, rows: Rows, new_graph: NewGraph) -> Callable[[], float]:
    """Measures the attention of a decode step; seconds of one layer, whose KV the others have
    driven out of the cache."""
    shape, step = decoder.base.shape, _step(decoder, rows)
    queries = torch.randn(
        *(rows.rows, shape.num_heads, shape.head_dim), dtype=decoder.base.dtype
    ).to(decoder.device)
    layers = range(shape.num_layers)

    def body(step: StepTensors) -> torch.Tensor:
        return sum_of([attend_step(queries, decoder.cache.layer(n), step, 0.09) for n in layers])

    graph = new_graph()
    with torch.inference_mode():
        graph.capture(body, step)

    def run() -> float:
        _step(decoder, rows)
        with torch.inference_mode():
            return seconds_of(graph.replay, decoder.device, repeats=REPEATS) / len(layers)

    return run


def sum_of(parts: list[Any]) -> torch.Tensor:
    """One small result, so that what each layer wrote can be freed in the graph."""
    total: torch.Tensor = torch.stack([part[0, 0, 0] for part in parts]).sum()
    return total


def _step(decoder: PagedDecoder, rows: Rows) -> StepTensors:
    decoder.buffers.fill(rows.batch())
    decoder.buffers.send()
    return decoder.buffers.tensors()


class NoVarlen(Exception):
    """Why torch's attention cannot be measured; the message says it."""


def varlen_case(
    decoder: PagedDecoder, rows: Rows, new_graph: NewGraph, *, page: int
) -> Callable[[], float]:
    """The same by ``torch.nn.attention.varlen`` with a block table, over pages of ``page``
    positions of the same memory. Raises NoVarlen."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415  # since 2.10
    except ImportError as error:
        raise NoVarlen(str(error)) from error
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise NoVarlen(f"torch {torch.__version__} has no block table in varlen_attn")
    shape, device = decoder.base.shape, decoder.device
    pages = -(-rows.positions // page)
    queries = torch.randn(
        *(rows.rows, shape.num_heads, shape.head_dim), dtype=decoder.base.dtype
    ).to(device)
    table = torch.arange(rows.rows * pages, dtype=torch.int32).view(rows.rows, pages).to(device)
    lengths = torch.full((rows.rows,), rows.positions, dtype=torch.int32, device=device)
    starts = torch.arange(rows.rows + 1, dtype=torch.int32, device=device)
    layers = [
        [
            part.reshape(-1, shape.num_kv_heads, shape.head_dim)[: rows.rows * pages * page].view(
                -1, page, shape.num_kv_heads, shape.head_dim
            )
            for part in decoder.cache.layer(number)
        ]
        for number in range(shape.num_layers)
    ]

    def body(_: StepTensors) -> torch.Tensor:
        return sum_of(
            [
                varlen_attn(
                    *(queries, keys, values, starts, None, 1, pages * page),
                    enable_gqa=True,
                    seqused_k=lengths,
                    block_table=table,
                    window_size=(-1, 0),
                )
                for keys, values in layers
            ]
        )

    graph = new_graph()
    try:
        with torch.inference_mode():
            graph.capture(body, _step(decoder, rows))
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise NoVarlen(str(error).partition("\n")[0]) from error

    def run() -> float:
        with torch.inference_mode():
            return seconds_of(graph.replay, device, repeats=REPEATS) / len(layers)

    return run
