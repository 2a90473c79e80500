"""Files of ``torch.save``: the ZIP container of PyTorch 1.6 and later, and the one before it.
The tensors of a safetensors file are read in the same way.

::

    ZIP                          before 1.6
    NAME/data.pkl    pickle      pickle  0x1950a86a20f9469cfc6c
    NAME/byteorder   "little"    pickle  1001
    NAME/data/KEY    storage     pickle  {"little_endian": True, …}
                                 pickle  the object
                                 pickle  [KEY, …]
                                 for each KEY: its size (8 bytes), its storage
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, ZipFile

import numpy as np

from prefixd.client.convert.archives import opened_archive, read_entry
from prefixd.client.convert.pickles import MAX_PICKLE_BYTES, read_pickle
from prefixd.client.convert.plain import is_safetensors, read_header
from prefixd.client.convert.symbols import Storage, StoredTensor, shown
from prefixd.client.convert.tensors import (
    MAX_BYTES,
    NUMPY_DTYPES,
    Array,
    Tensor,
    check_size,
    tensor_of,
    view_of,
)
from prefixd.client.errors import FormatError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001

ITEMSIZES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
"""Bytes of one element; 2 for the others."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The object that was saved; its tensors are read on demand, while the file is open."""

    value: object
    _read: Callable[[Storage], Array]

    def tensor(self, stored: object, *, name: str) -> Tensor:
        """The values of a tensor of ``value``; FormatError when it is none."""
        if not isinstance(stored, StoredTensor):
            raise FormatError(f"{name}: expected a tensor, found {shown(stored)}")
        if stored.storage.dtype not in NUMPY_DTYPES:
            raise FormatError(
                f"{name}: expected floating-point numbers, found {stored.storage.dtype}"
            )
        values = view_of(self._read(stored.storage), stored)
        return tensor_of(values, stored.storage.dtype, name=name)


@contextmanager
def opened_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """A file of ``torch.save`` or safetensors while the block lasts; FormatError when it is damaged
    or holds anything but tensors in lists and dicts."""
    with path.open("rb") as file:
        head = file.read(9)
        if head.startswith(b"PK"):
            with _opened_zip(path) as checkpoint:
                yield checkpoint
        elif is_safetensors(head):
            value, offsets = read_header(file)
            yield Checkpoint(value, _reader(file, offsets))
        elif path.suffix == ".safetensors":
            raise FormatError("damaged safetensors: the file does not begin with a header")
        else:
            yield _read_legacy(file)


@contextmanager
def _opened_zip(path: Path) -> Iterator[Checkpoint]:
    with opened_archive(path) as archive:
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if is_pickle(name)]
        if len(roots) != 1:
            raise FormatError(f"expected one data.pkl in the archive, found {len(roots)}")
        root = roots[0]
        if f"{root}byteorder" in archive.NameToInfo:
            order = _stored_entry(archive, f"{root}byteorder", limit=16)
            if order != b"little":
                raise FormatError(f"expected little-endian tensors, found {order!r}")
        head = _stored_entry(archive, f"{root}data.pkl", limit=MAX_PICKLE_BYTES)

        def read(storage: Storage) -> Array:
            data = _stored_entry(archive, f"{root}data/{storage.key}", limit=MAX_BYTES)
            return _array_of(data, storage)

        yield Checkpoint(read_pickle(io.BytesIO(head)).value, read)


def is_pickle(name: str) -> bool:
    """Whether an entry of an archive is the pickle of ``torch.save``."""
    return name.endswith("/data.pkl") and name.count("/") == 1


def _stored_entry(archive: ZipFile, name: str, *, limit: int) -> bytes:
    info = archive.NameToInfo.get(name)
    if info is not None and info.compress_type != ZIP_STORED:
        raise FormatError(f"{shown(name)}: expected an entry that is not compressed")
    return read_entry(archive, name, limit=limit)


def _array_of(data: bytes, storage: Storage) -> Array:
    expected = storage.size * _itemsize(storage)
    if len(data) != expected:
        raise FormatError(
            f"storage {shown(storage.key)}: expected {expected} bytes by its size and dtype, "
            f"found {len(data)}"
        )
    return np.frombuffer(data, dtype=NUMPY_DTYPES[storage.dtype])


def _itemsize(storage: Storage) -> int:
    return ITEMSIZES.get(storage.dtype, 2)


def _read_legacy(file: BinaryIO) -> Checkpoint:
    """The checkpoint in an open file of the older container."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic, version, system = (read_pickle(head).value for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION:
        raise FormatError("expected a file of torch.save, found another pickle")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FormatError("expected little-endian tensors")
    pickled, keys = read_pickle(head), read_pickle(head).value
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise FormatError("damaged file of torch.save: it does not list its storages by name")
    offsets = _offsets(file, [pickled.storages.get(key) for key in keys], begin=head.tell())

    return Checkpoint(pickled.value, _reader(file, offsets))


def _reader(file: BinaryIO, offsets: dict[str, int]) -> Callable[[Storage], Array]:
    """What reads a storage from an open file in which it begins at the offset of its key."""

    def read(storage: Storage) -> Array:
        if storage.key not in offsets:
            raise FormatError(f"expected the storage {shown(storage.key)} in the file, found none")
        size = storage.size * _itemsize(storage)
        check_size((size,), name=f"storage {shown(storage.key)}", itemsize=1)
        file.seek(offsets[storage.key])
        return _array_of(file.read(size), storage)

    return read


def _offsets(file: BinaryIO, storages: list[Storage | None], *, begin: int) -> dict[str, int]:
    """Where each storage's bytes begin; all of them are in the file."""
    offsets, end = {}, file.seek(0, os.SEEK_END)
    for storage in storages:
        if storage is None:
            raise FormatError("damaged file of torch.save: it lists a storage of no tensor")
        file.seek(begin)
        count = int.from_bytes(file.read(8), "little")
        offsets[storage.key] = begin + 8
        begin += 8 + count * _itemsize(storage)
        if count != storage.size or begin > end:
            raise FormatError(
                f"storage {shown(storage.key)}: expected {storage.size} elements in the file, "
                f"found {count} stated and {end} bytes in all"
            )
    return offsets
