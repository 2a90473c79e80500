"""ZIP archives, read in place: no entry is extracted, so no name of an entry becomes a path.

``zipfile`` reads the directory; the entries are read here, because it expands bzip2 and LZMA
without a bound. The sizes that an entry states are checked before it is read, the compressed one
against the file, the other against the caller's limit, and nothing expands beyond the stated size.
"""

import bz2
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixd.client.errors import FormatError

_LOCAL_HEADER_BYTES = 30


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A ZIP archive while the block lasts; FormatError when its directory is damaged."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise FormatError(f"damaged ZIP archive: {str(error)[:80]!a}") from None
    with archive:
        if len(archive.NameToInfo) != len(archive.filelist):
            raise FormatError("expected entries of different names in the archive, found two alike")
        yield archive


def read_entry(archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    """The bytes of an entry, at most ``limit``. FormatError when it is missing, damaged, or states
    sizes that it does not have."""
    shown = ascii(name[:80])
    info = archive.NameToInfo.get(name)
    if info is None:
        raise FormatError(f"expected the entry {shown} in the archive, found none")
    if info.file_size > limit:
        raise FormatError(f"{shown}: expected at most {limit} bytes, found {info.file_size}")
    if info.compress_type not in _EXPAND or info.flag_bits & 1:
        raise FormatError(f"{shown}: it is encrypted or has an unknown compression")
    try:
        data = _EXPAND[info.compress_type](_compressed(archive, info), info.file_size)
    except (zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        raise FormatError(f"{shown}: damaged entry: {str(error)[:80]!a}") from None
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise FormatError(f"{shown}: damaged entry: its size or checksum is another one")
    return data


def _compressed(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of an entry as they are in the file, behind its local header, name and extra
    field."""
    file = archive.fp
    assert file is not None
    size = file.seek(0, os.SEEK_END)
    begin, end = info.header_offset, info.header_offset + info.compress_size
    if begin < 0 or end > size:
        raise FormatError(f"{info.filename[:80]!a}: it states bytes that the file does not have")
    file.seek(begin)
    header = file.read(_LOCAL_HEADER_BYTES)
    lengths = [int.from_bytes(header[begin : begin + 2], "little") for begin in (26, 28)]
    file.seek(sum(lengths), os.SEEK_CUR)
    return file.read(info.compress_size)


def _inflate(data: bytes, size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)


def _expand_bzip2(data: bytes, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(data, size + 1)


def _expand_lzma(data: bytes, size: int) -> bytes:
    """Behind a version (2 bytes) and the length 5 (2 bytes): lc, lp and pb in one byte, the
    dictionary size in four. The decoder allocates its dictionary, which need not exceed ``size``.
    """
    if len(data) < 9 or data[4] >= 9 * 5 * 5:
        raise lzma.LZMAError("no LZMA header")
    bits, dictionary = data[4], int.from_bytes(data[5:9], "little")
    options = {"lc": bits % 9, "lp": bits // 9 % 5, "pb": bits // 45}
    options["dict_size"] = min(dictionary, max(size, 4096))
    filters = [{"id": lzma.FILTER_LZMA1, **options}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(data[9:], size + 1)


_EXPAND: dict[int, Callable[[bytes, int], bytes]] = {
    zipfile.ZIP_STORED: lambda data, _: data,
    zipfile.ZIP_DEFLATED: _inflate,
    zipfile.ZIP_BZIP2: _expand_bzip2,
    zipfile.ZIP_LZMA: _expand_lzma,
}
