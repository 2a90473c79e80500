"""The Triton kernels on a CPU, in Triton's interpreter, or on a GPU.

Triton decides when it is imported whether it interprets, and other tests' libraries import it: so
the kernels run in a process of their own.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import numpy as np
import torch

DEVICE = os.environ.get("PREFIXD_TEST_DEVICE", "cpu")


class OnDevice:
    """Launches kernels on a GPU."""

    def launch(self, name: str, *arguments: Any, **options: Any) -> Any:
        """The result of a function of ``launch``; what it writes to its first argument, ``kv`` in
        some, is written here too."""
        module = import_module("prefixd.server.model.kernels.launch")
        tensors = [_to_device(argument) for argument in arguments]
        result = getattr(module, name)(*tensors, **_each(_to_device, options))
        arguments[0].copy_(tensors[0])
        return _each(_to_host, result)


class Interpreter:
    """Launches kernels in the interpreter's process."""

    def __init__(self) -> None:
        self._processes = ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret)

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._processes.shutdown()

    def launch(self, name: str, *arguments: Any, **options: Any) -> Any:
        """As OnDevice.launch."""
        call = (name, *map(_to_numpy, arguments))
        result, first = self._processes.submit(_launch, *call, **_each(_to_numpy, options)).result()
        arguments[0].copy_(torch.from_numpy(first))
        return _each(_to_torch, result)


Launcher = Interpreter | OnDevice


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is not initialized with NaN
    interpreter = import_module("triton.runtime.interpreter")
    interpreter.InterpreterBuilder.create_dot = _dot


def _dot(_: Any, left: Any, right: Any, total: Any, *__: Any) -> Any:
    """A product whose rows have the same bits in any place, as on tensor cores. BLAS, which the
    interpreter uses, sums in an order that depends on the place of the row."""
    out = np.einsum("ik,kj->ij", left.data, right.data, dtype=np.float32) + total.data
    return type(total)(out, total.dtype.scalar)


def _launch(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    module = import_module("prefixd.server.model.kernels.launch")
    tensors = [_to_torch(argument) for argument in arguments]
    result = getattr(module, name)(*tensors, **_each(_to_torch, options))
    return _each(_to_numpy, result), _to_numpy(tensors[0])


def _each(convert: Any, values: Any) -> Any:
    if isinstance(values, dict):
        return {name: convert(value) for name, value in values.items()}
    return tuple(map(convert, values)) if isinstance(values, tuple) else convert(values)


def _to_numpy(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _to_torch(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if hasattr(value, "dtype") else value


def _to_device(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def _to_host(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
