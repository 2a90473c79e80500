"""What is missing, damaged or of another kind among the files of a base model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers.utils import cached_file

from prefixd.server.model.architecture import UnsupportedModel

COMPUTED = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.|causal_mask$|position_ids$")
"""Tensors in earlier checkpoints that transformers now computes."""

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights, the preferred one first; each may have an index instead."""

_OTHER_WEIGHTS = frozenset(
    {".gguf", ".h5", ".msgpack", ".onnx", ".pth", ".pt", ".bin", ".npz", ".safetensors"}
)
"""How files of weights in other formats or under other names end."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes of unquantized weights, as safetensors names them."""

_TORCH_FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

_OBJECTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files that hold a JSON object; so do those that end in index.json."""

_LFS = b"version https://git-lfs"

_SHOWN = 3
"""How many tensors a message names."""


def named(names: list[str]) -> str:
    """The first names, and how many there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (
        f" and {more} more ({len(names)} tensors)" if more > 0 else ""
    )


def snapshot(model: str) -> str:
    """The local folder of a Hugging Face id whose config has been downloaded."""
    return str(Path(str(cached_file(model, "config.json"))).parent)


def refuse_unreadable_files(
    folder: str, *, source: str | None = None, quantized: bool = False
) -> None:
    """Raise UnsupportedModel unless the weights of ``folder`` are there and readable, of a plain
    type unless its config says that they are ``quantized``, and its generation config is readable.

    Reads headers, not values. ``source`` is the name in messages. A Hugging Face id passes.
    """
    if not Path(folder).is_dir():
        return
    source = source or folder
    generation = Path(folder) / "generation_config.json"  # transformers would ignore a damaged one
    if generation.exists() and (damage := _damage(generation)):
        raise UnsupportedModel(f"{source}: {generation.name} {damage}")
    for path in _weight_files(Path(folder), source):
        if damage := _damage(path):
            raise UnsupportedModel(f"{source}: its weights cannot be loaded: {path.name} {damage}")
        others = (
            {}
            if quantized
            else {
                name: dtype
                for name, dtype in _dtypes(path)
                if dtype not in _FLOATS
                and name.endswith(("weight", "bias", "proj"))
                and not COMPUTED.search(name)
            }
        )
        if others:
            kinds = ", ".join(sorted(set(others.values())))
            raise UnsupportedModel(
                f"{source} has weights of the type {kinds}: {named(sorted(others))}; expected "
                "float32, bfloat16 or float16"
            )


def _weight_files(folder: Path, source: str) -> list[Path]:
    for name in _WEIGHTS:
        if (path := folder / name).exists() or path.is_symlink():
            return [path]
        if (index := folder / f"{name}.index.json").is_file():
            return _shards(index, source)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_WEIGHTS)
    raise UnsupportedModel(
        f"{source} holds no file named {' or '.join(_WEIGHTS)}, and no index of one"
        + (f"; got {', '.join(found[:_SHOWN])}, which prefixd does not read" if found else "")
    )


def _shards(index: Path, source: str) -> list[Path]:
    what = f"{source}: its weights cannot be loaded:"
    if damage := _damage(index):
        raise UnsupportedModel(f"{what} {index.name} {damage}")
    shards = json.loads(index.read_bytes()).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UnsupportedModel(f"{what} {index.name} has no weight_map from tensors to files")
    paths = [index.parent / name for name in sorted(set(shards.values()))]
    for path in paths:
        if not path.is_file():
            raise UnsupportedModel(f"{what} the file {path.name} is missing")
    return paths


def _dtypes(path: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor of a file that is not damaged."""
    if path.suffix == ".bin":
        for name, tensor in _unpickled(path).items():
            if isinstance(tensor, torch.Tensor):
                dtype = tensor.dtype
                yield str(name), _TORCH_FLOATS.get(dtype, str(dtype).removeprefix("torch."))
        return
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            yield name, file.get_slice(name).get_dtype()


def _unpickled(path: Path) -> dict[Any, Any]:
    """The tensors of a .bin file, without their values."""
    tensors = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(tensors, dict):
        raise UnpicklingError(f"expected a dictionary, got {type(tensors).__name__}")
    return tensors


def damaged_file(source: str, error: Exception) -> str:
    """The file of a folder that is missing or damaged, when there is one after ``error``."""
    if isinstance(error, FileNotFoundError):
        return f"the file {Path(str(error).rpartition(': ')[2].strip(chr(39))).name} is missing"
    for path in sorted(Path(source).glob("*")):
        is_ours = path.suffix in {".json", ".safetensors"} or path.name.startswith("pytorch_model")
        if is_ours and (damage := _damage(path)):
            return f"{path.name} {damage}"
    return ""


def _damage(path: Path) -> str:
    if not path.is_file():
        return "is not a file" if path.exists() else "is a link to a file that is missing"
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return "is a Git LFS pointer, not the file itself"
    if path.suffix == ".json":
        return _damaged_json(path)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix == ".bin":
            _unpickled(path)
    except SafetensorError as error:
        return f"is damaged or incomplete ({error})"
    except Exception:  # noqa: BLE001  # an unpickler may raise any error on a damaged file
        return "is damaged or holds more than tensors"
    return ""


def _damaged_json(path: Path) -> str:
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return "is not JSON"
    is_object = path.name in _OBJECTS or path.name.endswith("index.json")
    if is_object and not isinstance(content, dict):
        return f"holds no JSON object, got {type(content).__name__}"
    if path.name == "tokenizer.json":
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  # all that the tokenizers package raises
            return f"is not read by the tokenizers package ({error})"
    return ""


def lacks_tokenizer_file(source: str) -> bool:
    """Whether ``source`` is a folder without a tokenizer.json."""
    folder = Path(source)
    return folder.is_dir() and not (folder / "tokenizer.json").is_file()


def names_python_tokenizer(source: str) -> str:
    """The class that a folder's tokenizer_config.json names, where it runs in Python only."""
    try:
        config = json.loads((Path(source) / "tokenizer_config.json").read_bytes())
        name = config.get("tokenizer_class")
        known = getattr(transformers, name, None)
    except (OSError, ValueError, AttributeError, TypeError):
        return ""
    return name if known is not None and not hasattr(known, "backend_tokenizer") else ""
