"""The native decoder: a whole forward pass in one call of the library of ``prefixd_cpu.h``."""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prefixd.server.engine.step import BlockCopy, GatedRows, ThreadUse
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.cpu import interface
from prefixd.server.model.cpu.library import NativeLibrary
from prefixd.server.model.decoder import Logits
from prefixd.server.model.exact import NotExact, require_plain
from prefixd.server.model.parts import Dense, Layer, Linear, Parts
from prefixd.server.model.rows import Row

_DTYPES = {torch.float32: interface.F32, torch.bfloat16: interface.BF16}

_SPIN_US = 200
"""How long threads wait actively: longer than the Python between two steps of a busy engine."""


class NativeFailure(RuntimeError):
    """A call of the library failed; the message is the library's."""


def refuse_native(parts: Parts, *, block_size: int) -> None:
    """Raise NotExact for a model that the native decoder does not compute."""
    base = parts.base
    require_dtype(base.dtype)
    require_plain(base)
    if base.device.type != "cpu":
        raise NotExact(f"the device is {base.device}; expected the CPU")
    if block_size % 16:
        raise NotExact(f"blocks have {block_size} positions; expected a multiple of 16")
    if base.shape.head_dim % 16 or base.shape.head_dim > 256:
        raise NotExact(f"heads have size {base.shape.head_dim}; expected a multiple of 16 to 256")


def require_dtype(dtype: torch.dtype) -> None:
    """Raise NotExact for a dtype that the native decoder does not compute."""
    if dtype not in _DTYPES:
        raise NotExact(f"the dtype is {dtype}; expected float32 or bfloat16")


class NativeDecoder:
    """Runs a model of an exact family. The weights are taken from the module, which cannot be run
    afterwards."""

    state_blocks = 0

    def __init__(
        self,
        parts: Parts,
        library: NativeLibrary,
        *,
        kernels: str,
        num_blocks: int,
        block_size: int,
        threads: int = 1,
    ) -> None:
        """``num_blocks`` counts the null block. Raises NativeFailure, MemoryError."""
        base = self.base = parts.base
        self.name, self.block_size, self.device = kernels, block_size, base.device
        self._library, self._functions = library, library.functions
        self._vocab = len(parts.head.weight)
        self.num_layers = base.shape.num_layers
        self._num_rows = 2 * base.shape.num_layers
        self._width = base.shape.num_kv_heads * base.shape.head_dim
        self._candidates = min(base.num_logits, self._vocab)
        self._handle = self._functions.pfx_new(
            ctypes.byref(self._shape(parts)), interface.KERNELS.index(kernels)
        )
        if not self._handle:
            raise self._failure()
        # When the process ends, a pass may still run: the system frees the memory then.
        weakref.finalize(self, self._functions.pfx_free, self._handle).atexit = False
        self.set_threads(threads)
        self._take_weights(parts)
        self._call("pfx_set_pool", num_blocks)

    def _shape(self, parts: Parts) -> interface.Shape:
        shape = self.base.shape
        return interface.Shape(
            dtype=_DTYPES[self.base.dtype],
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            width=shape.embedding_width,
            vocab=self._vocab,
            embeddings=self.base.num_embeddings,
            rotary_dim=2 * parts.cosine.shape[1],
            max_positions=len(parts.cosine),
            block_size=self.block_size,
            norm_eps=parts.norm_eps,
            attention_scale=parts.attention_scale,
        )

    def _take_weights(self, parts: Parts) -> None:
        self._call("pfx_set_rotary", parts.cosine.data_ptr(), parts.sine.data_ptr())
        for index, layer in enumerate(parts.take_layers()):
            weights = _Pointers(self.base.dtype)
            self._call("pfx_set_layer", index, ctypes.byref(_layer_of(layer, weights)))
        weights = _Pointers(self.base.dtype)
        head = weights.linear(parts.head)
        embedding = None if parts.tied else weights.of(parts.embedding)
        self._call("pfx_set_ends", weights.of(parts.final_norm), ctypes.byref(head), embedding)
        parts.remove_ends()

    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass: write the KV of its tokens and return the logits of its outputs."""
        num_outputs = len(batch.outputs)
        logits = torch.empty(num_outputs, self._vocab)
        best = torch.empty(num_outputs, dtype=torch.int32)
        best_value = torch.empty(num_outputs)
        ids, inputs = self._inputs(batch)
        rows = batch.rows
        tables = _tables([row.block_table for row in rows])
        offsets, lengths, starts, outputs = (
            np.array(values, dtype=np.int32)
            for values in (
                [row.offset for row in rows],
                [row.length for row in rows],
                [row.start for row in rows],
                batch.outputs,
            )
        )
        gated = _gated_of(rows)
        step = interface.Step(
            num_tokens=len(ids),
            token_ids=ids.ctypes.data,
            inputs=None if inputs is None else inputs.data_ptr(),
            num_rows=len(rows),
            offsets=offsets.ctypes.data,
            lengths=lengths.ctypes.data,
            starts=starts.ctypes.data,
            tables=tables.ctypes.data,
            table_width=tables.shape[1],
            num_outputs=num_outputs,
            outputs=outputs.ctypes.data,
            logits=logits.data_ptr(),
            best=best.data_ptr(),
            best_value=best_value.data_ptr(),
            candidates=self._candidates,
        )
        if gated is not None:
            counts, layers, gated_tables = gated
            step.gated_counts, step.gated_layers = counts.ctypes.data, layers.ctypes.data
            step.gated_tables, step.gated_width = gated_tables.ctypes.data, gated_tables.shape[1]
        self._call("pfx_run", ctypes.byref(step))
        return Logits(logits[:, : self._candidates], (best_value, best.long()))

    def _inputs(self, batch: FlatBatch) -> tuple[Any, torch.Tensor | None]:
        """Token ids [num_tokens], -1 where the input is given, and the given inputs."""
        ids = np.array(batch.token_ids, dtype=np.int32)
        if not batch.inputs:
            return ids, None
        for offset, values in batch.inputs:
            ids[offset : offset + len(values)] = -1
        inputs = torch.cat([values for _, values in batch.inputs]).to(self.base.dtype)
        return ids, inputs.contiguous()

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them."""
        if blocks:
            array = np.array(blocks, dtype=np.int32)
            self._call("pfx_zero_blocks", array.ctypes.data, len(array))

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks."""
        if copies:
            sources = np.array([copy.source for copy in copies], dtype=np.int32)
            targets = np.array([copy.target for copy in copies], dtype=np.int32)
            self._call("pfx_copy_blocks", sources.ctypes.data, targets.ctypes.data, len(sources))

    def read_kv(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table."""
        kv = torch.empty(self._num_rows, num_tokens, self._width, dtype=self.base.dtype)
        table = np.array(block_table, dtype=np.int32)
        self._call("pfx_read_kv", table.ctypes.data, 0, num_tokens, kv.data_ptr())
        return kv

    def write_kv(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` from position ``start`` on."""
        kv = kv.to(self.base.dtype).contiguous()
        table = np.array(block_table, dtype=np.int32)
        self._call("pfx_write_kv", table.ctypes.data, start, kv.shape[1], kv.data_ptr())

    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a Decoder, in float32."""
        inputs = inputs.to(self.base.dtype).contiguous()
        keys, values = torch.empty(2, len(inputs), self._width)
        pointers = (keys.data_ptr(), values.data_ptr())
        self._call("pfx_project", layer, inputs.data_ptr(), len(inputs), *pointers)
        return keys, values

    def set_threads(self, threads: int) -> None:
        """Let passes use this many threads, the caller's included."""
        self._call("pfx_set_threads", threads, _SPIN_US)

    def thread_use(self) -> ThreadUse:
        """Of the passes so far: the library leaves out a thread that costs more than it gains."""
        counters = interface.Counters()
        self._functions.pfx_read_counters(self._handle, ctypes.byref(counters))
        return ThreadUse(counters.threads, counters.thread_changes, counters.late_steps)

    def _call(self, name: str, *arguments: Any) -> None:
        if getattr(self._functions, name)(self._handle, *arguments):
            raise self._failure()

    def _failure(self) -> Exception:
        """The error of the call that failed last."""
        message = self._library.error()
        return (MemoryError if message.endswith("out of memory") else NativeFailure)(message)


def _tables(block_tables: Sequence[Sequence[int]]) -> Any:
    """Block tables as one array [rows, widest], padded with the null block."""
    tables = np.zeros((len(block_tables), max(map(len, block_tables))), dtype=np.int32)
    for row, table in zip(tables, block_tables, strict=True):
        row[: len(table)] = table
    return tables


def _gated_of(rows: Sequence[Row]) -> tuple[Any, Any, Any] | None:
    """Rows of the gated prefix of each row (0: it has none), its first layer and its blocks; None
    where no row has one."""
    if all(row.gated is None for row in rows):
        return None
    prefixes = [row.gated or GatedRows((), 0) for row in rows]
    counts = np.array([prefix.num_tokens for prefix in prefixes], dtype=np.int32)
    layers = np.array([prefix.first_layer for prefix in prefixes], dtype=np.int32)
    return counts, layers, _tables([prefix.block_table for prefix in prefixes])


class _Pointers:
    """Addresses of tensors in the decoder's dtype; keeps the tensors until the call has ended."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._tensors: list[torch.Tensor] = []

    def of(self, tensor: torch.Tensor | None) -> int | None:
        """The address of the values row by row; None for None."""
        if tensor is None:
            return None
        self._tensors.append(tensor.detach().to(self._dtype).contiguous())
        return self._tensors[-1].data_ptr()

    def rounded(
        self, weight: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[int | None, int | None]:
        """The addresses of a weight and its scales; with scales the weight stays int8."""
        if scales is None:
            return self.of(weight), None
        self._tensors += [weight.contiguous(), scales.contiguous()]
        return self._tensors[-2].data_ptr(), self._tensors[-1].data_ptr()

    def linear(self, linear: Linear) -> interface.Linear:
        """The addresses of a weight, its bias and its scales."""
        weight, scales = self.rounded(linear.weight, linear.scales)
        return interface.Linear(weight=weight, bias=self.of(linear.bias), scales=scales)


def _layer_of(layer: Layer, weights: _Pointers) -> interface.Layer:
    fields: dict[str, Any] = {
        name: weights.of(getattr(layer, name))
        for name in ("input_norm", "post_norm", "q_norm", "k_norm")
    }
    fields |= {name: weights.linear(getattr(layer, name)) for name in ("q", "k", "v", "o")}
    mlp = layer.mlp
    dense = mlp if isinstance(mlp, Dense) else mlp.shared
    if dense is not None:
        fields |= {name: weights.linear(getattr(dense, name)) for name in ("gate", "up", "down")}
        fields["inner"] = len(dense.gate.weight)
    if not isinstance(mlp, Dense):
        gate_up, gate_up_scales = weights.rounded(mlp.gate_up, mlp.gate_up_scales)
        down, down_scales = weights.rounded(mlp.down, mlp.down_scales)
        fields |= {
            "experts": len(mlp.router),
            "experts_per_token": mlp.per_token,
            "expert_inner": mlp.down.shape[2],
            "normalize_weights": mlp.normalize,
            "router": weights.of(mlp.router),
            "expert_gate_up": gate_up,
            "expert_gate_up_scales": gate_up_scales,
            "expert_down": down,
            "expert_down_scales": down_scales,
            "shared_gate": weights.of(mlp.shared_gate),
        }
    return interface.Layer(**fields)
