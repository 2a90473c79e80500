"""Strict readers of uploaded JSON and of safetensors headers: one meaning per document, or none.

The standard JSON parser lets a later duplicate key win, accepts NaN and Infinity, and keeps
unpaired surrogates that no later encoder can write: two readers may see two different documents.

The safetensors library accepts duplicate names (the last wins), a leading space, names such as
``../../etc/x`` and rank 100,000, and spends 11 seconds on a header of a million empty tensors. Here
everything is decided within a header cap, and only float32, float16 and bfloat16 are known::

    | length n: 8 bytes, little endian | JSON header: n bytes | tensors, in offset order, no gaps |
"""

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from prefixd.store.errors import ArtifactRefused, quoted

MAX_DEPTH = 16
"""Deepest nesting accepted: PEFT configs nest three deep."""


class StrictJsonError(ValueError):
    """The bytes are not strict JSON; the message says why."""


def parse_object(raw: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Parse a JSON object (UTF-8) strictly; raise StrictJsonError.

    The caller caps the size. Refused are: a byte order mark, duplicate keys, NaN and Infinity
    (also by overflow, as 1e999), unpaired surrogates, and nesting deeper than ``max_depth``.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise StrictJsonError("nested too deep") from None
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"{error.msg} at character {error.pos}") from None
    except StrictJsonError:
        raise
    except ValueError:  # an integer of thousands of digits: the interpreter's own limit
        raise StrictJsonError("a number has too many digits") from None
    if not isinstance(value, dict):
        raise StrictJsonError(f"expected an object, got {kind_of(value)}")
    _check(value, levels=max_depth)
    return value


def canonical(value: dict[str, Any]) -> bytes:
    """The canonical encoding of a parsed object: sorted keys, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def kind_of(value: object) -> str:
    """What JSON calls this value, for messages."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


def shown(value: object) -> str:
    """An uploaded JSON value, for messages: scalars shortened, arrays and objects by kind."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    # Not str() of any integer: past 4300 digits that raises.
    if isinstance(value, int) and abs(value) < 2**64:
        return str(value)
    return kind_of(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise StrictJsonError(f"duplicate key {quoted(key)}")
        result[key] = value
    return result


def _constant(name: str) -> float:
    raise StrictJsonError(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJsonError("a number is too large for a float")
    return value


def _check(value: object, *, levels: int) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise StrictJsonError(f"an unpaired surrogate in {quoted(value)}") from None
    elif isinstance(value, dict | list):
        if levels == 0:
            raise StrictJsonError("nested too deep")
        for item in value:
            _check(item, levels=levels - 1)
        for item in value.values() if isinstance(value, dict) else ():
            _check(item, levels=levels - 1)


MAX_HEADER_BYTES = 64 * 1024
"""Headers of real prefixes have a few hundred bytes."""

DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
"""safetensors' names: our name, bytes per element."""

_MAX_RANK = 3
_LENGTH_BYTES = 8
_MAGICS = (
    (b"PK\x03\x04", "archive", "a ZIP archive (torch.save writes one)"),
    (b"PK\x05\x06", "archive", "an empty ZIP archive"),
    (b"\x1f\x8b", "archive", "a gzip archive"),
    (b"BZh", "archive", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "archive", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "archive", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "archive", "a Zstandard archive"),
    (b"Rar!", "archive", "a RAR archive"),
    (b"GGUF", "malformed_header", "a GGUF file"),
    (b"\x93NUMPY", "malformed_header", "a NumPy file"),
    (b"\x89HDF", "malformed_header", "an HDF5 file"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file. ``size`` counts elements; ``offset`` is in bytes, from the beginning of
    the safetensors bytes."""

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    size: int
    offset: int


def read_header(file: BinaryIO, *, size: int, allowed: frozenset[str]) -> dict[str, TensorEntry]:
    """Read and check the header of the ``size`` bytes of safetensors that begin at the file's
    position; it must name exactly the ``allowed`` tensors. Raises ArtifactRefused.

    Reads at most ``MAX_HEADER_BYTES``, for any file.
    """
    head = file.read(min(size, _LENGTH_BYTES + MAX_HEADER_BYTES))
    length = _header_length(head, size)
    header = _parse(head[_LENGTH_BYTES : _LENGTH_BYTES + length])
    _check_names(header, allowed)
    data_start = _LENGTH_BYTES + length
    entries = {name: _entry(name, value, data_start) for name, value in header.items()}
    _check_layout(entries, header, data_bytes=size - data_start)
    return entries


def read_single(file: BinaryIO, *, size: int, name: str, advice: str) -> TensorEntry:
    """As ``read_header``, for the one tensor of a file, which may have any name; in messages it is
    ``name``. ``advice`` says how to write such a file."""
    head = file.read(min(size, _LENGTH_BYTES + MAX_HEADER_BYTES))
    length = _header_length(head, size, advice)
    header = _parse(head[_LENGTH_BYTES : _LENGTH_BYTES + length])
    if len(header) != 1:
        code = "unknown_tensor" if header else "missing_tensor"
        raise ArtifactRefused(code, f"expected one tensor, got {len(header)}", param=name)
    (value,) = header.values()
    entry = _entry(name, value, _LENGTH_BYTES + length)
    _check_layout({name: entry}, {name: value}, data_bytes=size - _LENGTH_BYTES - length)
    return entry


_ADAPTER_ADVICE = (
    "save the adapter with safe_serialization=True and upload adapter_model.safetensors"
)


def _header_length(head: bytes, size: int, advice: str = _ADAPTER_ADVICE) -> int:
    if size < _LENGTH_BYTES + 2:
        _refuse_foreign_formats(head, advice)
        raise _malformed(
            f"expected safetensors: 8 bytes of header length and a JSON header; got {size} bytes"
        )
    (length,) = struct.unpack_from("<Q", head)
    # Only after the length is read: a valid header of 640 bytes begins 80 02, as a pickle does.
    if length > MAX_HEADER_BYTES or length > size - _LENGTH_BYTES or head[8:9] != b"{":
        _refuse_foreign_formats(head, advice)
    if length > MAX_HEADER_BYTES:
        raise ArtifactRefused(
            "header_too_large",
            f"expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, got {length}",
            param="weights",
        )
    if length > size - _LENGTH_BYTES:
        raise ArtifactRefused(
            "truncated",
            f"the header states {length} bytes, but only {size - _LENGTH_BYTES} follow",
            param="weights",
        )
    if length < 2 or head[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise _malformed("a safetensors header begins with '{' right after its length")
    return int(length)


def _refuse_foreign_formats(head: bytes, advice: str) -> None:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise ArtifactRefused(
            "pickle",
            f"expected safetensors, got a Python pickle, which is never opened here: {advice}",
            param="weights",
        )
    for magic, code, words in _MAGICS:
        if head.startswith(magic):
            raise ArtifactRefused(
                code, f"expected safetensors, got {words}: {advice}", param="weights"
            )
    if head[257:262] == b"ustar":
        raise ArtifactRefused(
            "archive", f"expected safetensors, got a tar archive: {advice}", param="weights"
        )


def _parse(raw: bytes) -> dict[str, Any]:
    # Writers pad with spaces at the end, to align the tensors; nothing else may follow.
    try:
        header = parse_object(raw.rstrip(b" "))
    except StrictJsonError as error:
        raise _malformed(f"the safetensors header is not valid: {error}") from None
    comments = header.pop("__metadata__", {})
    if not isinstance(comments, dict) or not all(isinstance(v, str) for v in comments.values()):
        raise _malformed("__metadata__ must be an object of strings")
    return header


def _check_names(header: dict[str, Any], allowed: frozenset[str]) -> None:
    unknown = sorted(set(header) - allowed)
    if unknown:
        names = ", ".join(quoted(name) for name in unknown[:3])
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ArtifactRefused(
            "unknown_tensor",
            f"expected only {_listed(allowed)}; got also {names}{more}. A prefix must not carry "
            "weights of the base model (modules_to_save, resized embeddings)",
            param="weights",
        )
    missing = allowed - set(header)
    if missing:
        raise ArtifactRefused(
            "missing_tensor",
            f"expected {_listed(allowed)}; missing: {_listed(missing)}",
            param="weights",
        )


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    fields = {"dtype", "shape", "data_offsets"}
    if not isinstance(value, dict) or set(value) != fields:
        raise _malformed(f"tensor {name} must have exactly {_listed(fields)}")
    dtype = value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ArtifactRefused(
            "wrong_dtype",
            f"tensor {name}: expected dtype {_listed(set(DTYPES))}, got {shown(dtype)}",
            param=name,
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        got = f"{len(shape)} items" if isinstance(shape, list) else kind_of(shape)
        raise ArtifactRefused(
            "wrong_shape",
            f"tensor {name}: expected a shape of at most {_MAX_RANK} whole numbers from 0, "
            f"got {got}",
            param=name,
        )
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _malformed(f"tensor {name}: data_offsets must be two whole numbers from 0")
    our_dtype, itemsize = DTYPES[dtype]
    size, offset = math.prod(shape), data_start + offsets[0]
    return TensorEntry(name, our_dtype, itemsize, tuple(shape), size, offset)


def _check_layout(
    entries: dict[str, TensorEntry], header: dict[str, Any], *, data_bytes: int
) -> None:
    position = 0
    for begin, end, name in sorted((*header[name]["data_offsets"], name) for name in entries):
        expected = entries[name].size * entries[name].itemsize
        if begin != position or end - begin != expected:
            raise ArtifactRefused(
                "wrong_offsets",
                f"tensor {name}: expected bytes {position} to {shown(position + expected)} by its "
                f"shape and dtype, got {shown(begin)} to {shown(end)}",
                param=name,
            )
        position = end
    if position != data_bytes:
        code = "truncated" if position > data_bytes else "trailing_bytes"
        raise ArtifactRefused(
            code,
            f"expected {shown(position)} bytes of tensors, got {data_bytes}",
            param="weights",
        )


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _listed(names: set[str] | frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _malformed(message: str) -> ArtifactRefused:
    return ArtifactRefused("malformed_header", message, param="weights")
