"""ZIP archives, read in place: no entry is extracted, so no name of an entry becomes a path.

Before an entry is read, the sizes it states are checked: the compressed one against the file, the
other against the caller's limit. Compressed data is expanded in small pieces and never beyond the
stated size.
"""

import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixd.client.errors import FormatError

PIECE_BYTES = 4096
"""Read at once. zipfile expands all of a compressed piece: at most some 80 MB for this size."""

MAX_DICTIONARY_BYTES = 64 * 1024 * 1024
"""The dictionary of LZMA's highest preset. The decoder allocates what the entry states."""

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)

_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # an encrypted entry
    ValueError,
    OSError,  # bzip2 data that does not expand
)


@contextmanager
def opened_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A ZIP archive while the block lasts; FormatError when it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGE as error:
        raise FormatError(f"damaged ZIP archive: {str(error)[:80]!a}") from None


def read_entry(archive: zipfile.ZipFile, name: str, *, limit: int) -> bytes:
    """The bytes of an entry, at most ``limit``. FormatError when it is missing or states sizes that
    it does not have."""
    shown = ascii(name[:80])
    info = archive.NameToInfo.get(name)
    if info is None:
        raise FormatError(f"expected the entry {shown} in the archive, found none")
    if info.file_size > limit:
        raise FormatError(f"{shown}: expected at most {limit} bytes, found {info.file_size}")
    _check_compression(archive, info)
    data = bytearray()
    with archive.open(info) as file:
        while piece := file.read(PIECE_BYTES):
            data += piece
    if len(data) != info.file_size:
        raise FormatError(f"{shown}: expected {info.file_size} bytes, found {len(data)}")
    return bytes(data)


def _check_compression(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    file, shown = archive.fp, ascii(info.filename[:80])
    assert file is not None
    if info.compress_type not in _COMPRESSIONS:
        raise FormatError(f"{shown}: unknown compression {info.compress_type}")
    size = file.seek(0, 2)
    stored = info.compress_type == zipfile.ZIP_STORED
    if info.compress_size > size or (stored and info.compress_size != info.file_size):
        raise FormatError(f"{shown}: it states {info.compress_size} bytes, which it does not have")
    if info.compress_type == zipfile.ZIP_LZMA:
        # The data begins behind the local header: 30 bytes, name, extra field. Its own header has
        # the version (2 bytes), the length 5 (2), lc/lp/pb (1) and the dictionary size (4).
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
        offset = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        file.seek(info.header_offset + 30 + offset + 5)
        dictionary = int.from_bytes(file.read(4), "little")
        if dictionary > MAX_DICTIONARY_BYTES:
            raise FormatError(
                f"{shown}: expected an LZMA dictionary of at most {MAX_DICTIONARY_BYTES} bytes, "
                f"found {dictionary}"
            )
