"""A file as a response, whole or the parts of it that Range names."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from stat import S_IFREG
from typing import Any

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from prefixd.server.api.conditions import READ
from prefixd.server.api.error_responses import ErrorBody
from prefixd.server.errors import BadRequest, RangeNotSatisfiable

_RANGE = re.compile(r"([0-9]{0,4000})-([0-9]{0,4000})")


class RangedFile(FileResponse):
    """A file with a strong tag, and parts of it by RFC 9110. For HEAD nothing is read, so ``path``
    may be missing; ``modified`` is in seconds since 1970."""

    def __init__(
        self,
        path: Path,
        *,
        size: int,
        modified: int,
        filename: str,
        headers: Mapping[str, str],
        media_type: str = "application/octet-stream",
        status_code: int = 200,
    ) -> None:
        super().__init__(
            path,
            status_code,
            headers=headers,
            media_type=media_type,
            filename=filename,
            # From the catalog: equal for every copy of the file.
            stat_result=os.stat_result((S_IFREG, 0, 0, 1, 0, 0, size, *[modified] * 3)),
        )
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file. Raises BadRequest and RangeNotSatisfiable before anything is sent."""
        if scope["state"]["is_head"]:
            scope = {**scope, "method": "HEAD"}
        await super().__call__(self._with_valid_range(scope), receive, send)

    def _with_valid_range(self, scope: Scope) -> Scope:
        """``scope`` with only the satisfiable ranges, or without any where the whole file is to be
        sent."""
        headers = Headers(scope=scope)
        wanted, if_range = headers.get("range"), headers.get("if-range")
        kept = [pair for pair in headers.raw if pair[0] not in {b"range", b"if-range"}]
        # Never a date: two files within one second have the same.
        is_current = if_range is None or if_range == self.headers["etag"]
        if wanted is not None and scope["method"] == "GET" and is_current:
            ranges = satisfiable(wanted, size=self._size)
            if ranges:
                kept.append((b"range", f"bytes={','.join(ranges)}".encode()))
        return {**scope, "headers": kept}


def satisfiable(header: str, *, size: int) -> list[str]:
    """The ranges of a Range header that a file of ``size`` bytes has; none for a unit other than
    bytes, which is ignored. Raises BadRequest, RangeNotSatisfiable."""
    unit, equals, listed = header.partition("=")
    if equals and unit.strip().lower() != "bytes":
        return []
    ranges = [part.strip(" \t") for part in listed.split(",") if part.strip(" \t")]
    if not ranges or not all(_is_range(part) for part in ranges):
        raise BadRequest("expected a Range like bytes=0-99; received another", code="invalid_range")
    kept = [part for part in ranges if _begins_within(part, size)]
    if not kept:
        raise RangeNotSatisfiable(
            f"the file has {size} bytes; the range starts after its end",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return kept


def _is_range(part: str) -> bool:
    match = _RANGE.fullmatch(part)
    if match is None or part == "-":
        return False
    first, last = match.groups()
    return not (first and last) or int(first) <= int(last)


def _begins_within(part: str, size: int) -> bool:
    first, _, last = part.partition("-")
    return int(first) < size if first else int(last) > 0


def _header(text: str) -> dict[str, Any]:
    return {"description": text, "schema": {"type": "string"}}


def file_responses(headers: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries of a route that returns a file with ``headers``, by name."""
    content = {"schema": {"type": "string", "format": "binary"}}
    shown = READ[200]["headers"] | {"Accept-Ranges": _header("bytes"), **headers}
    return {
        200: {"content": {"application/octet-stream": content}, "headers": shown},
        206: {
            "description": "The parts in Range.",
            "content": {"application/octet-stream": content, "multipart/byteranges": content},
            "headers": shown
            | {"Content-Range": _header("Of a single part: bytes FIRST-LAST/SIZE.")},
        },
        304: READ[304],
        416: {
            "model": ErrorBody,
            "description": "The file has no such part.",
            "headers": {"Content-Range": _header("bytes */SIZE")},
        },
    }
