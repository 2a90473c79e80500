"""Multipart uploads as a stream: small parts in memory, the weights straight to a file.

The parser is python-multipart's; what it finds is checked part by part, so that a part nobody asked
for is refused at its header and not after its gigabytes.
"""

import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart import MultipartParser
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import parse_options_header

from prefixd.server.api.body import capped
from prefixd.server.errors import BadRequest, TooLarge

SMALL_PART_BYTES = 64 * 1024
"""Most bytes of a part that is kept in memory."""

_FRAMING_BYTES = 64 * 1024
_FLUSH_BYTES = 1024 * 1024
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{1,70}")


@dataclass(frozen=True, slots=True)
class Upload:
    """A complete upload: the small parts, the file, and the names of all parts that came.

    ``file`` is gone when the block it was received in ends.
    """

    parts: Mapping[str, bytes]
    file: Path
    names: frozenset[str]


@asynccontextmanager
async def received(
    request: Request, *, small: tuple[str, ...], file: str, folder: Path, limit: int
) -> AsyncIterator[Upload]:
    """Receive the parts named ``small`` and the part ``file`` of at most ``limit`` bytes.

    ``folder`` must exist. Raises BadRequest for what is not such an upload, TooLarge past a limit.
    """
    boundary = _boundary(request)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="upload-") as target:
        parts = _Parts(small=small, file=file, limit=limit)
        parser = parts.parser(boundary)
        total = limit + len(small) * SMALL_PART_BYTES + _FRAMING_BYTES
        async for chunk in capped(request, total):
            _feed(parser, chunk)
            if len(parts.pending) >= _FLUSH_BYTES:
                await run_in_threadpool(parts.flush, target)
        parts.check_complete()
        await run_in_threadpool(parts.flush, target)
        target.flush()
        found = {name: bytes(data) for name, data in parts.found.items() if name != file}
        yield Upload(parts=found, file=Path(target.name), names=frozenset(parts.found))


def _boundary(request: Request) -> bytes:
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if _BOUNDARY.fullmatch(boundary) is None:
        raise BadRequest("expected a multipart body with a boundary of 1 to 70 characters")
    return boundary


def _feed(parser: MultipartParser, chunk: bytes) -> None:
    try:
        parser.write(chunk)
    except MultipartParseError as error:
        raise BadRequest(f"the multipart body is malformed: {error}") from error


class _Parts:
    """What the parser's callbacks gather."""

    def __init__(self, *, small: tuple[str, ...], file: str, limit: int) -> None:
        self._small = small
        self._file = file
        self._limit = limit
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._part = ""
        self._size = 0
        self._complete = False
        self.found: dict[str, bytearray] = {}
        self.pending = bytearray()

    def parser(self, boundary: bytes) -> MultipartParser:
        """A parser that tells this object."""
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    def flush(self, target: IO[bytes]) -> None:
        """Write what has come of the file."""
        target.write(self.pending)
        self.pending.clear()

    def check_complete(self) -> None:
        """Raise BadRequest unless the body came to its end."""
        if not self._complete:
            raise BadRequest("the multipart body ends before its closing boundary")

    def _begin(self) -> None:
        self._headers = {}
        self._size = 0

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
        if name in self.found:
            raise BadRequest(f"the part '{name}' came twice", code="duplicate_part", param=name)
        self._part = name
        self.found[name] = bytearray()

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        limit = self._limit if self._part == self._file else SMALL_PART_BYTES
        if self._size > limit:
            raise TooLarge(
                f"expected at most {limit} bytes in the part '{self._part}'; received more",
                param=self._part,
            )
        target = self.pending if self._part == self._file else self.found[self._part]
        target += data[start:end]

    def _on_end(self) -> None:
        self._complete = True
