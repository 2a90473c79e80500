"""Multipart uploads as a stream: small parts in memory, the weights straight to a file.

The parser is python-multipart's; each part is checked at its header, so that an unknown part is
refused there and not after gigabytes.
"""

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from prefixd.server.api.body import FLUSH_BYTES, Spool, capped
from prefixd.server.errors import BadRequest, TooLarge
from prefixd.store.artifact.config import MAX_CONFIG_BYTES
from prefixd.store.disk import DiskGuard

SMALL_PART_BYTES = MAX_CONFIG_BYTES
"""Most bytes of a part that is kept in memory."""

_FRAMING_BYTES = 64 * 1024
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,70}")


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete upload: the small parts, the file, and the names of all received parts.

    ``file`` is removed at the end of the block it was received in; ``filename`` is the client's
    name for it, empty where it gave none.
    """

    parts: Mapping[str, bytes]
    file: Path
    names: frozenset[str]
    filename: str


@asynccontextmanager
async def received(
    request: Request,
    *,
    small: tuple[str, ...],
    file: str,
    folder: Path,
    disk: DiskGuard,
    limit: int,
) -> AsyncIterator[Upload]:
    """Receive the parts named ``small`` and the part ``file`` of at most ``limit`` bytes.

    ``folder`` must exist. Raises BadRequest for another upload, TooLarge for one over a limit,
    StorageFull.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if _BOUNDARY.fullmatch(boundary) is None:
        raise BadRequest("expected a multipart body with a boundary of 1 to 70 characters")
    async with Spool(folder, disk) as spool:
        parts = _Parts(small, file, limit)
        parser = parts.parser(boundary)
        total = limit + len(small) * SMALL_PART_BYTES + _FRAMING_BYTES
        async for chunk in capped(request, total):
            try:
                parser.write(chunk)
            except MultipartParseError as error:
                raise BadRequest(f"the multipart body is malformed: {error}") from error
            await spool.take(parts.pending, at_least=FLUSH_BYTES)
        if not parts.complete:
            raise BadRequest("the multipart body ends before its closing boundary")
        await spool.take(parts.pending)
        small_parts = {name: bytes(data) for name, data in parts.received.items() if name != file}
        yield Upload(small_parts, spool.path, frozenset(parts.received), parts.filename)


@dataclass(slots=True)
class _Parts:
    """Parts of one body, filled by the parser's callbacks."""

    _small: tuple[str, ...]
    _file: str
    _limit: int
    _header: bytearray = field(default_factory=bytearray)
    _value: bytearray = field(default_factory=bytearray)
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _part: str = ""
    _size: int = 0
    complete: bool = False
    filename: str = ""
    received: dict[str, bytearray] = field(default_factory=dict)
    pending: bytearray = field(default_factory=bytearray)

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser that calls this object."""
        return MultipartParser(
            boundary,
            {
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers(self) -> None:
        raw = self._headers.get(b"content-disposition", b"").decode("latin-1")
        _, options = parse_options_header(raw)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        expected = (*self._small, self._file)
        if name not in expected:
            raise BadRequest(
                f"expected the parts {', '.join(expected)}; received a part named {name[:80]!a}",
                code="unknown_part",
            )
        if name in self.received:
            raise BadRequest(f"the part '{name}' came twice", code="duplicate_part", param=name)
        self._part = name
        if name == self._file:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        self.received[name] = bytearray()
        self._headers = {}
        self._size = 0

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        limit = self._limit if self._part == self._file else SMALL_PART_BYTES
        if self._size > limit:
            raise TooLarge(
                f"expected at most {limit} bytes in the part '{self._part}'; received at least "
                f"{self._size}",
                param=self._part,
            )
        target = self.pending if self._part == self._file else self.received[self._part]
        target += data[start:end]

    def _on_end(self) -> None:
        self.complete = True
