"""Lines of the input of a batch, and of its output and error files: JSON texts, without I/O."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from prefixd.server.api.body import check_keys
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.batch_records import BatchError, LineAnswer

ID_CHARACTERS = 256
"""Most characters of a ``custom_id``."""

MOST_ERRORS = 100
"""How many errors of an input are reported."""

_FIELDS = ("custom_id", "method", "url", "body")
_SHOWN = 80


class LineRefused(Exception):
    """A line that is no request of the batch."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class InputLine:
    """A request of a batch: line ``number`` of its input, from 1, and the JSON of its body."""

    number: int
    custom_id: str
    body: bytes


def numbered(file: BinaryIO, *, max_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """The lines with something on them, with their numbers from 1; of one that is longer than
    ``max_bytes``, one byte more than that."""
    number, most = 0, -1 if max_bytes is None else max_bytes + 1
    while raw := file.readline(most):
        number += 1
        last = raw
        while not last.endswith(b"\n"):
            last = file.readline(most)
            if not last:
                break
        if raw.strip():
            yield number, raw


def parse_line(
    number: int, raw: bytes, *, endpoint: str, max_bytes: int | None = None
) -> InputLine:
    """The request of a line. Raises LineRefused."""
    if max_bytes is not None and len(raw) > max_bytes:
        raise LineRefused("line_too_long", f"expected a line of at most {max_bytes} bytes")
    request = _object(raw)
    for name in request:
        if name not in _FIELDS:
            raise LineRefused(
                "unknown_field",
                f"expected the fields {', '.join(_FIELDS)}; received {name[:_SHOWN]!a}",
                name[:_SHOWN].encode("utf-8", "backslashreplace").decode(),
            )
    for name in _FIELDS:
        if name not in request:
            raise LineRefused("missing_field", f"the field '{name}' is missing", name)
    custom_id, method, url, body = (request[name] for name in _FIELDS)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= ID_CHARACTERS:
        raise LineRefused(
            "invalid_custom_id",
            f"expected a text of 1 to {ID_CHARACTERS} characters; received {_shown(custom_id)}",
            "custom_id",
        )
    if method != "POST":
        raise LineRefused(
            "invalid_method", f"expected the method POST; received {_shown(method)}", "method"
        )
    if url != endpoint:
        raise LineRefused(
            "invalid_url",
            f"expected the endpoint of the batch, {endpoint}; received {_shown(url)}",
            "url",
        )
    if not isinstance(body, dict):
        raise LineRefused("invalid_body", f"expected an object; received {_shown(body)}", "body")
    if body.get("stream"):
        raise LineRefused(
            "invalid_body", "expected no 'stream': a batch has whole answers", "body.stream"
        )
    return InputLine(number, custom_id, _encoded(body))


def _encoded(body: dict[str, Any]) -> bytes:
    """No longer than it is in the line, where the limit of a body was applied."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which the route refuses
        return json.dumps(body, separators=(",", ":")).encode()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        check_keys(raw)
        value = json.loads(raw.decode("utf-8-sig"))
    except BadRequest as error:
        raise LineRefused("invalid_json_line", error.message) from None
    except UnicodeDecodeError:
        raise LineRefused("invalid_json_line", "expected UTF-8; received another text") from None
    except json.JSONDecodeError as error:
        raise LineRefused(
            "invalid_json_line",
            "expected one JSON object; what was received is not, or ends too early at column "
            f"{error.colno}",
        ) from None
    except ValueError:  # of Python's limit for the digits of a number
        raise LineRefused("invalid_json_line", "expected integers of fewer digits") from None
    if not isinstance(value, dict):
        raise LineRefused("invalid_json_line", f"expected an object; received {_shown(value)}")
    return value


def _shown(value: object) -> str:
    return ascii(value)[:_SHOWN]


@dataclass(frozen=True, slots=True)
class Validated:
    """What an input has: ``total`` requests, or ``errors``."""

    total: int
    errors: tuple[BatchError, ...]


def validate(file: BinaryIO, *, endpoint: str, max_lines: int | None, max_bytes: int) -> Validated:
    """Check each line of an input; MOST_ERRORS of the errors at most are listed."""
    errors: list[BatchError] = []
    seen: dict[str, int] = {}
    total = 0
    for number, raw in numbered(file, max_bytes=max_bytes):
        total += 1
        if max_lines is not None and total > max_lines:
            message = f"expected at most {max_lines} lines (max_batch_lines); received more"
            return Validated(0, (BatchError("too_many_lines", message, number), *errors))
        try:
            line = parse_line(number, raw, endpoint=endpoint, max_bytes=max_bytes)
            _check_first(line, seen.setdefault(line.custom_id, number))
        except LineRefused as refused:
            errors.append(BatchError(refused.code, refused.message, number, refused.param))
            if len(errors) == MOST_ERRORS:
                break
    if not total:
        errors.append(BatchError("empty_file", "expected at least one line; the file is empty"))
    return Validated(total, tuple(errors))


def _check_first(line: InputLine, first: int) -> None:
    if first != line.number:
        raise LineRefused(
            "duplicate_custom_id",
            f"expected each custom_id once; line {first} has {_shown(line.custom_id)} too",
            "custom_id",
        )


def answered(
    batch_id: str, line: InputLine, *, status: int, request_id: str, body: bytes
) -> LineAnswer:
    """The answer to a line that got the response ``body``, which is JSON."""
    text = body.decode()
    if "\n" in text:
        text = json.dumps(json.loads(text), ensure_ascii=False)
    head = {"status_code": status, "request_id": request_id}
    response = f'{json.dumps(head)[:-1]}, "body": {text}}}'
    return LineAnswer(
        line.number, status >= 400, _entry(batch_id, line.number, line.custom_id, response, "null")
    )


def unanswered(batch_id: str, number: int, custom_id: str, *, error: BatchError) -> str:
    """The line of the error file for a line that never ran."""
    shown = json.dumps({"code": error.code, "message": error.message}, ensure_ascii=False)
    return _entry(batch_id, number, custom_id, "null", shown)


def _entry(batch_id: str, number: int, custom_id: str, response: str, error: str) -> str:
    entry_id = f"batch_req_{batch_id.removeprefix('batch_')}_{number}"
    return (
        f'{{"id": "{entry_id}", "custom_id": {json.dumps(custom_id)}, '
        f'"response": {response}, "error": {error}}}'
    )
