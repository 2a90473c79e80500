"""Compile the kernels for GPUs, without one, and print what the binaries use.

``python -m benchmarks.kernels [--out FILE.json]``, or ``python benchmarks/kernels.py`` with this
project's folder ``server`` on the path. Needs torch and Triton alone, in any versions that the
kernels support. Each kernel is compiled as it is launched for a step of a Llama with 8 KV heads in
bfloat16: the launches themselves give the types and constants.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from prefixd.server.model.kernels import decode, elementwise, launch, prefill

KV_HEADS, GROUP, WIDTH, INNER = 8, 4, 4096, 14336
ROWS, MAX_BLOCKS, BLOCK = 64, 256, 16
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name, and the options of the compiler."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Binary:
    """What one kernel uses on one GPU: ``registers`` of each thread, bytes of each thread in local
    memory (spills), bytes of each program in shared memory, copies from global to shared memory
    that do not wait (instructions)."""

    kernel: str
    head_dim: int
    capability: int
    warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    async_copies: int


def launches(head_dim: int, capability: int, dtype: str = "bfloat16") -> list[Launch]:
    """The launches of one layer in a mixed step, with queries and keys normed and not."""
    kind, num_heads = getattr(torch, dtype), KV_HEADS * GROUP
    kv = torch.empty(2, 8, BLOCK, KV_HEADS, head_dim, dtype=kind)
    qkv = torch.empty(ROWS, num_heads + 2 * KV_HEADS, head_dim, dtype=kind)
    index = torch.zeros(ROWS, dtype=torch.int32)
    turn = {"cosine": torch.empty(64, head_dim // 2), "sine": torch.empty(64, head_dim // 2)}
    hidden, norm = torch.empty(ROWS, WIDTH, dtype=kind), torch.empty(head_dim, dtype=kind)
    table = torch.zeros(ROWS, MAX_BLOCKS, dtype=torch.int32)
    rows = (index, index, table, index, index, torch.zeros(ROWS, 2, dtype=torch.int32))
    with recorded(capability) as record:
        launch.write_kv(kv, qkv[:, :KV_HEADS], qkv[:, :KV_HEADS], index)
        for weight in (None, norm):
            launch.rotate_and_write(
                kv, qkv, index, index, **turn, q_norm=weight, k_norm=weight, eps=1e-5
            )
        launch.attend(qkv[:, :num_heads], kv, *rows, scale=0.1, max_queries=2, max_length=4096)
        launch.add_rms_norm(hidden, hidden, hidden[0], 1e-5)
        launch.silu_and_mul(torch.empty(ROWS, 2 * INNER, dtype=kind))
    return record


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Launches inside are recorded, as for a GPU of ``capability``, in place of running."""
    record: list[Launch] = []
    kernels = [
        (module, name, kernel)
        for module in (decode, elementwise, prefill)
        for name, kernel in vars(module).items()
        if isinstance(kernel, JITFunction)
    ]
    capability_of = launch.capability_of
    try:
        launch.capability_of = lambda _: capability  # type: ignore[assignment]
        for module, name, kernel in kernels:
            setattr(module, name, _Recorder(kernel, record))
        yield record
    finally:
        launch.capability_of = capability_of
        for module, name, kernel in kernels:
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, kernel: Any, record: list[Launch]) -> None:
        self._kernel, self._record = kernel, record

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*positional: Any, **named: Any) -> None:
            names = self._kernel.arg_names
            arguments = dict(zip(names, positional, strict=False))
            options = {name: value for name, value in named.items() if name not in names}
            arguments |= {name: value for name, value in named.items() if name in names}
            assert set(arguments) == set(names)
            self._record.append(Launch(self._kernel, arguments, options))

        return record


def compile_for(call: Launch, capability: int) -> Binary:
    """Compile as Triton's launch would for tensors that torch allocated."""
    kernel = call.kernel
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, call.arguments[parameter.name]
        constexpr = parameter.is_constexpr or value is None
        signature[name] = "constexpr" if constexpr else _type_of(value)
        if constexpr:
            constants[(place,)] = value
        elif not _is_unspecialized(parameter) and _is_divisible(value):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=call.options
    )
    registers, local_bytes, assembly = _inspect(compiled.asm["cubin"])
    head_dim = call.arguments.get("HEAD_DIM", 0)
    return Binary(
        kernel=kernel.__name__ + (" normed" if call.arguments.get("NORMED") else ""),
        head_dim=head_dim,
        capability=capability,
        warps=call.options["num_warps"],
        registers=registers,
        local_bytes=local_bytes,
        shared_bytes=compiled.metadata.shared,
        async_copies=len(re.findall(r"\bLDGSTS\S*\.128\b", assembly)),
    )


def _type_of(value: Any) -> str:
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32"
    return POINTERS[str(value.dtype).removeprefix("torch.")]


def _is_unspecialized(parameter: Any) -> bool:
    return bool(parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def _is_divisible(value: Any) -> bool:
    """All tensors are: torch aligns what it allocates, and one layer's part of the pool."""
    return not isinstance(value, float) and (not isinstance(value, int) or value % 16 == 0)


def _inspect(binary: bytes) -> tuple[int, int, str]:
    """Registers, bytes of local memory and assembly of a binary."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        assembly = _output(tools / "nvdisasm", "-c", file.name)
    counts = {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return counts["REG"], counts["STACK"] + counts["LOCAL"], assembly


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def table(binaries: Sequence[Binary]) -> str:
    """As Markdown."""
    lines = [
        "| Kernel | Head size | GPU | Warps | Registers | Local bytes | Shared KB | Async copies |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {b.kernel} | {b.head_dim or 'any'} | sm_{b.capability} | {b.warps} | {b.registers} | "
        f"{b.local_bytes} | {b.shared_bytes / 1024:.1f} | {b.async_copies} |"
        for b in binaries
    ]
    return "\n".join(lines)


def main() -> None:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write versions and figures here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        binaries = [
            compile_for(call, capability)
            for capability in (80, 90)
            for head_dim in (64, 128)
            for call in launches(head_dim, capability)
            if "HEAD_DIM" in call.arguments or head_dim == 128
        ]
    print(table(binaries))
    if options.out:
        report = {"triton": triton.__version__, "binaries": [asdict(b) for b in binaries]}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
