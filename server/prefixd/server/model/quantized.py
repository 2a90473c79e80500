"""Checkpoints with quantized weights: what loads them, and what their layers compute.

transformers reads each method with packages of its own, into layers or tensors of their own
classes. Such weights are never cast, packed or read by prefixd: the module computes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import transformers

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.tensors import is_packed, is_wrapped

FIELDS = ("quantization_config", "compression_config")
"""Config keys that describe quantized weights."""

_PLAIN = "gguf"
"""What transformers notes of weights that it read from a GGUF file and saved as plain ones."""

_LINEAR = 1e-4
"""Largest relative error of f(a + b) = f(a) + f(b) that float32 explains; rounding inputs to eight
bits gives 1e-2, computing in bfloat16 4e-3."""

_APART = 1e-3
"""Largest relative change of a row that another row may cause: none, but for kernels that add in
another order. Rounding the inputs again by a neighbour's scale changes it by 1e-2 or more."""

_LOUD = 1e4
"""How much larger the neighbour's row is made."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MAX_TEXT = 60
"""Longest part of a config that a message or a metric shows."""


@dataclass(frozen=True, slots=True)
class _Method:
    """The distributions that transformers needs for a method, and whether it needs a GPU."""

    packages: tuple[str, ...] = ()
    gpu: bool = False


_METHODS = {
    "aqlm": _Method(("aqlm", "accelerate")),
    "auto-round": _Method(("auto-round",)),
    "awq": _Method(("gptqmodel", "accelerate")),
    "bitnet": _Method(("accelerate",)),
    "bitsandbytes": _Method(("bitsandbytes", "accelerate")),
    "compressed-tensors": _Method(("compressed-tensors",)),
    "eetq": _Method(("kernels", "accelerate"), gpu=True),
    "fbgemm_fp8": _Method(("fbgemm-gpu", "accelerate"), gpu=True),
    "fouroversix": _Method(("fouroversix",)),
    "fp8": _Method(("accelerate",)),
    "fp_quant": _Method(("fp-quant",), gpu=True),
    "gptq": _Method(("gptqmodel", "optimum")),
    "higgs": _Method(("flute-kernel", "accelerate"), gpu=True),
    "mxfp4": _Method(("accelerate",)),
    "mxfp8": _Method(("accelerate",)),
    "quanto": _Method(("optimum-quanto", "accelerate")),
    "quark": _Method(("amd-quark",)),
    "sinq": _Method(("sinq",)),
    "spqr": _Method(("spqr-quant", "accelerate"), gpu=True),
    "torchao": _Method(("torchao",)),
    "vptq": _Method(("vptq", "accelerate"), gpu=True),
}
"""The methods whose checkpoints transformers 5.23 reads; of hqq and nvfp4 it only writes them."""


def scheme_of(config: Any) -> str | None:
    """How a checkpoint is quantized, such as ``torchao Int8WeightOnlyConfig``; None for plain
    weights."""
    fields = _fields(config)
    if fields is None:
        return None
    return " ".join(part[:_MAX_TEXT] for part in (_method(fields), _detail(fields)) if part)


def refuse_unloadable(source: str, config: Any, device: torch.device) -> None:
    """Raise UnsupportedModel for a checkpoint that is quantized by a method that transformers does
    not read, whose package is not installed, or that does not run on ``device``."""
    fields = _fields(config)
    if fields is None:
        return
    name = _method(fields) or "an unnamed method"
    what = f"{source} is quantized with {name}"
    method = _METHODS.get(name)
    if method is None:
        raise UnsupportedModel(
            f"{what}, whose checkpoints transformers {transformers.__version__} does not read; "
            f"expected plain weights or one of {', '.join(_METHODS)}"
        )
    if missing := [package for package in method.packages if not _is_installed(package)]:
        extra = " (the extra prefixd[torchao])" if name == "torchao" else ""
        raise UnsupportedModel(
            f"{what}, which transformers reads with {' and '.join(method.packages)}; "
            f"not installed here: {' and '.join(missing)}; expected it to be installed with "
            f"prefixd{extra}"
        )
    if method.gpu and device.type == "cpu":
        raise UnsupportedModel(
            f"{what}, which runs on a GPU alone; expected the device cuda, received {device}"
        )


def refuse_divided(config: Any, *, ranks: int) -> None:
    """Raise UnsupportedModel for the config of a quantized model that ``ranks`` processes would
    share."""
    if scheme := scheme_of(config):
        raise UnsupportedModel(
            f"{config.model_type} is quantized with {scheme}, and tensor_parallel is {ranks}: only "
            "plain weights can be divided; expected 1"
        )


def refuse_rounded(config: Any) -> None:
    """Raise UnsupportedModel for the config of a quantized model that the setting ``quantize``
    would round again."""
    if scheme := scheme_of(config):
        raise UnsupportedModel(
            f"{config.model_type} is quantized with {scheme}, and quantize is int8, which rounds "
            "plain weights; expected none"
        )


def placement(config: Any, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` by which quantized weights are read on the GPU that they
    will run on: some packages prepare them there."""
    if device.type == "cpu" or scheme_of(config) is None or not _is_installed("accelerate"):
        return {}
    return {"device_map": {"": device}}


def restore_at_load(config: Any) -> None:
    """Ask for plain weights where transformers would restore them in the first forward pass, which
    is that of compressed-tensors: memory would grow while serving."""
    fields = getattr(config, "quantization_config", None)
    if isinstance(fields, dict) and _method(fields) == "compressed-tensors":
        fields["dequantize"] = True


def plain(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight, in floating point where it is a wrapped one."""
    return weight.dequantize() if is_wrapped(weight) else weight


@torch.no_grad()
def computes_exactly(module: Any, *, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether all quantized layers of a model compute with the inputs that they get, in float32
    where these are float32: no rounding of inputs, no arithmetic in half precision.

    Raises UnsupportedModel for layers that do not run in ``dtype``, and for those whose output for
    a row depends on the other rows: one request would change another's output.
    """
    exact = True
    for layer, part in _kinds(module):
        rows = _rows(part, 2).to(device, dtype)
        _require_runs(f"{name} has quantized layers", part, rows)
        _require_rows_apart(f"{name} has a quantized layer, {layer},", part, rows)
        exact = exact and _is_linear(part, device)
    return exact and not any(map(_unknown, module.modules()))


def _unknown(part: Any) -> bool:
    """Whether a part holds quantized weights that are not those of a matrix or of embeddings."""
    return is_packed(part) and not hasattr(part, "in_features") and not _is_embedding(part)


def _is_embedding(part: Any) -> bool:
    return isinstance(part, torch.nn.Embedding)


def _kinds(module: Any) -> Iterator[tuple[str, Any]]:
    """One quantized layer of each class, scheme and size, with its name."""
    seen = set()
    for name, part in module.named_modules():
        if is_packed(part) and hasattr(part, "in_features"):
            weight = getattr(part, "weight", None)
            flatten = getattr(weight, "__tensor_flatten__", lambda weight=weight: type(weight))
            scheme = flatten()
            kind = (type(part), part.in_features, part.out_features, str(scheme))
            if kind not in seen:
                seen.add(kind)
                yield name, part


def _require_runs(what: str, part: Any, rows: torch.Tensor) -> None:
    reason = _failure(part, rows)
    if reason is None:
        return
    fitting = [str(dtype) for dtype in _DTYPES if _failure(part, rows.to(dtype)) is None]
    expected = f"; expected {' or '.join(fitting)}" if fitting else ""
    message = f"{what} that do not run on {rows.device} in {rows.dtype} ({reason}){expected}"
    raise UnsupportedModel(message.replace("torch.", ""))


def _failure(part: Any, rows: torch.Tensor) -> str | None:
    """Why a layer does not run."""
    try:
        part(rows)
    except Exception as error:  # noqa: BLE001  # the kernels of any package
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def _require_rows_apart(what: str, part: Any, rows: torch.Tensor) -> None:
    loud = rows * torch.tensor([[1.0], [_LOUD]]).to(rows)
    alone, together = part(rows)[0].float(), part(loud)[0].float()
    change = (alone - together).norm() / alone.norm()
    if not change <= _APART:
        raise UnsupportedModel(
            f"{what} that rounds its inputs by all rows of a batch: a loud neighbour changes a row "
            f"by {change:.2g} of its size, and so one request another's output; expected at most "
            f"{_APART:g}, as where weights alone or each row by itself are rounded"
        )


def _is_linear(part: Any, device: torch.device) -> bool:
    first, second = _rows(part, 2)
    rows = torch.stack([first, second, first + second, torch.zeros_like(first)]).to(device)
    if _failure(part, rows) is not None:  # kernels for half precision alone
        return False
    out = part(rows).float()
    error = (out[2] + out[3] - out[0] - out[1]).norm() / out[2].norm()
    return bool(error <= _LINEAR)


def _rows(part: Any, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, part.in_features, generator=generator)


def _fields(config: Any) -> Mapping[str, Any] | None:
    """What a config says of quantized weights; None of plain ones."""
    for holder in (config, config.get_text_config(decoder=True)):
        for field in FIELDS:
            value = getattr(holder, field, None)
            if value is None:
                continue
            fields: Mapping[str, Any] = value if isinstance(value, dict) else value.to_dict()
            if _method(fields) != _PLAIN:
                return fields
    return None


def _method(fields: Mapping[str, Any]) -> str:
    method = fields.get("quant_method") or ""
    return str(getattr(method, "value", method))


def _detail(fields: Mapping[str, Any]) -> str:
    """The kind within a method: a class of torchao, a number of bits, a format."""
    kind = fields.get("quant_type")
    while isinstance(kind, dict):
        kind = kind.get("_type") or kind.get("default")
    if kind:
        return str(kind)
    if fields.get("load_in_4bit"):
        return str(fields.get("bnb_4bit_quant_type") or "4 bits")
    bits = 8 if fields.get("load_in_8bit") else fields.get("bits")
    return f"{bits} bits" if bits else str(fields.get("format") or fields.get("weights") or "")


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
