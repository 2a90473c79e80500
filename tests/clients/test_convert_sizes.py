"""Arrays of numpy and ZIP archives whose headers state other sizes and types than they have."""

import io
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prefixd.client.errors import FormatError
from tests.clients.foreign_files import embeddings, memory_below, read

MIB = 1024 * 1024
FLOATS = np.arange(8, dtype=np.float32)


def npy(header: str, data: bytes = b"", *, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1")
    width = "<H" if version == b"\x01\x00" else "<I"
    return b"\x93NUMPY" + version + struct.pack(width, len(text)) + text + data


def header(descr: str, shape: str, order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    "data",
    [
        npy(header("'<f4'", "(536870912,)"), b"\0" * 64),  # 2 GB
        npy(header("'<f4'", "(999999999999, 999999999999)"), b"\0" * 64),
        npy(header("'<f4'", "(4, 4)"), b"\0" * 63),
        npy(header("'<f4'", "(4, 4)"), b"\0" * 65),
        npy(header("'|O'", "(4,)"), pickle.dumps([1, 2, 3, 4])),
        npy(header("[('a', '<f4')]", "(4,)"), b"\0" * 16),
        npy(header("'<i8'", "(2, 4)"), b"\0" * 64),
        npy(header("'<c8'", "(2, 4)"), b"\0" * 64),
        npy(header("'<f4'", "(" * 4000 + ")" * 4000)),
        npy(header("__import__('os')", "(2, 4)")),
        npy(header("'<f4'", "(2, -4)")),
        npy(header("'<f4'", "(2, 4)"), b"\0" * 32, version=b"\x09\x00"),
        npy("x" * 5000),
        npy(header("'<f4'", "(8,)"), b"\0" * 32),  # one axis
        npy(header("'<f4'", "(0, 4)")),
        npy(header("'<f4'", "()"), b"\0" * 4),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
        b"\x93NUMPY",
    ],
    ids=range(18),
)
def test_other_arrays_are_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "table.npy"
    file.write_bytes(data)
    with memory_below(4 * MIB), pytest.raises(FormatError):
        read(file)


def test_a_table_of_two_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "table.npy"
    head = npy(header("'<f4'", "(65536, 8192)"))
    file.write_bytes(head)
    with file.open("r+b") as sparse:
        sparse.truncate(len(head) + 2**31)
    with memory_below(4 * MIB), pytest.raises(FormatError, match="at most 1073741824 bytes"):
        read(file)


# -- archives -------------------------------------------------------------------------------------


def kobold(tensor: bytes, compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=compression) as archive:
        archive.writestr("tensor.npy", tensor)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_entry_that_expands_beyond_its_size_is_refused(compression: int, tmp_path: Path) -> None:
    zeros = npy(header("'<f4'", "(2, 4)"), bytes(8 * MIB))
    archive = bytearray(kobold(zeros, compression))
    stated = struct.pack("<I", len(zeros))
    assert archive.count(stated) == 2  # in the local and in the central header
    for size in (2**31, 160):
        file = tmp_path / f"{size}.zip"
        file.write_bytes(archive.replace(stated, struct.pack("<I", size)))
        with memory_below(4 * MIB), pytest.raises(FormatError):
            read(file)


def test_a_large_dictionary_of_lzma_is_not_allocated(tmp_path: Path) -> None:
    archive = bytearray(kobold(npy(header("'<f4'", "(2, 4)"), FLOATS.tobytes()), zipfile.ZIP_LZMA))
    properties = archive.index(b"\x05\x00\x5d") + 3
    archive[properties : properties + 4] = struct.pack("<I", 2**31)
    file = tmp_path / "prompt.zip"
    file.write_bytes(archive)
    with memory_below(4 * MIB):
        assert embeddings(read(file)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_names_of_entries_are_never_paths(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tensor.npy", npy(header("'<f4'", "(2, 4)"), FLOATS.tobytes()))
        archive.writestr("../escaped", "x")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "prompt.zip").write_bytes(buffer.getvalue())
    read(folder / "prompt.zip")
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "prompt.zip"]


@pytest.mark.parametrize(
    "meta", [b"[1]", b"{", b'{"name": NaN}', b"[" * 9000, b"\xff", b"x" * 20_000]
)
def test_other_descriptions_are_refused(meta: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tensor.npy", npy(header("'<f4'", "(2, 4)"), FLOATS.tobytes()))
        archive.writestr("meta.json", meta)
    (tmp_path / "prompt.zip").write_bytes(buffer.getvalue())
    with pytest.raises(FormatError, match=r"meta\.json"):
        read(tmp_path / "prompt.zip")
