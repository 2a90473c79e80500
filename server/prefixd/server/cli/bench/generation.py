"""One streamed generation of an OpenAI-compatible server, measured."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from prefixd.client.errors import (
    BY_CODE,
    ApiError,
    BadRequestError,
    ClientError,
    ConnectError,
    InvalidPrefixError,
    ProtocolError,
    StreamInterruptedError,
    TimedOutError,
    TransportError,
)
from prefixd.client.streams import SseDecoder
from prefixd.client.wire import ErrorDetails, Response, dump, error_of
from prefixd.server.cli.bench.connection import ConnectionPool, DataSink, Reply

Prompt = str | Sequence[int]
"""A text, or for the endpoint ``completions`` token ids."""

Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
OPTIONAL_FIELDS = ("ignore_eos", "stream_options")
"""Fields that a server may refuse: the first is not of OpenAI's API, the second is a later one."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What was measured of one request. Times are in seconds; ``arrived`` has that of each event
    with text, from when the request was due. Of a failed one, ``error`` is the kind and ``message``
    what the server or the socket said."""

    model: str
    ended: float
    arrived: tuple[float, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    has_usage: bool = False
    late: float = 0.0
    error: str | None = None
    message: str = ""

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.arrived[0]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.arrived[-1] - self.arrived[0]) / (self.output_tokens - 1)

    def gaps(self) -> list[float]:
        """Times between successive events with text."""
        return [later - earlier for earlier, later in pairwise(self.arrived)]


@dataclass(frozen=True)
class Target:
    """A server, and the fields of requests that it takes."""

    pool: ConnectionPool
    endpoint: Endpoint
    timeout: float
    optional: tuple[str, ...] = field(default=OPTIONAL_FIELDS)

    async def models(self) -> list[str]:
        """The names that the server lists; the base comes first in a list of prefixd."""
        reply = await self._send("GET", "/v1/models")
        try:
            return [str(model["id"]) for model in json.loads(_accepted(reply).body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise ProtocolError(
                f"expected a list of models from {self.pool.url}/v1/models, received "
                f"{reply.body[:80]!r}: name one with --model"
            ) from None

    async def generate(
        self, prompt: Prompt, *, model: str, output_tokens: int, due: float | None = None
    ) -> Generation:
        """Stream one generation. ``due``: when it should have been sent, of ``perf_counter``;
        its times count from then. Raises ClientError."""
        body = self._body(prompt, model=model, output_tokens=output_tokens)
        sent = time.perf_counter()
        start = sent if due is None else due
        reader = _EventReader(start)
        _accepted(await self._send("POST", PATHS[self.endpoint], dump(body), reader.feed))
        return replace(reader.result(model), late=sent - start)

    async def measure(
        self, prompt: Prompt, *, model: str, output_tokens: int, due: float | None = None
    ) -> Generation:
        """As ``generate``; an error is recorded in the result."""
        start = time.perf_counter() if due is None else due
        try:
            return await self.generate(prompt, model=model, output_tokens=output_tokens, due=due)
        except ClientError as error:
            ended = time.perf_counter() - start
            return Generation(model, ended, error=error_kind(error), message=str(error))

    async def adapted(self, prompt: str, *, model: str) -> "Target":
        """The target without the optional fields that the server refuses. Raises ClientError where
        it refuses the request without them, too."""
        refusal: ClientError | None = None
        for optional in (OPTIONAL_FIELDS, OPTIONAL_FIELDS[1:], OPTIONAL_FIELDS[:1], ()):
            target = replace(self, optional=optional)
            try:
                await target.generate(prompt, model=model, output_tokens=2)
            except (BadRequestError, InvalidPrefixError) as error:
                refusal = refusal or error
            else:
                return target
        assert refusal is not None
        raise refusal

    def _body(self, prompt: Prompt, *, model: str, output_tokens: int) -> dict[str, object]:
        body: dict[str, object] = {"model": model, "max_tokens": output_tokens, "temperature": 0}
        body["stream"] = True
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        values: dict[str, object] = {
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        return body | {name: values[name] for name in self.optional}

    async def _send(
        self, method: str, path: str, body: bytes = b"", on_data: DataSink | None = None
    ) -> Reply:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.pool.send(method, path, body, on_data=on_data)
        except TimeoutError:
            raise TimedOutError(
                f"{self.pool.url} did not end its response in {self.timeout:g} s"
            ) from None


def error_kind(error: ClientError) -> str:
    """The kind that errors are counted by: a status with its code, or what broke."""
    if isinstance(error, ApiError):
        return f"{error.status} {error.code or error.type or 'error'}"
    kinds: dict[type[ClientError], str] = {
        ConnectError: "not connected",
        TimedOutError: "timed out",
        TransportError: "connection lost",
        StreamInterruptedError: "stream ended early",
    }
    return next((kinds[kind] for kind in kinds if isinstance(error, kind)), "invalid response")


def _accepted(reply: Reply) -> Reply:
    """The reply. Raises ApiError for another status than 200."""
    if reply.status != 200:
        raise error_of(Response(reply.status, reply.headers, reply.body))
    return reply


class _EventReader:
    """Reads a stream of events as its bytes arrive. ``start`` is the time that times count from."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._decoder = SseDecoder()
        self._arrived: list[float] = []
        self._usage: dict[str, Any] = {}
        self._ended = 0.0
        self._has_end = False

    def feed(self, now: float, data: bytes) -> None:
        """Take the bytes that arrived at ``now``. Raises ApiError, ProtocolError."""
        self._ended = now - self._start
        for event in self._decoder.feed(data):
            if event.data == "[DONE]":
                self._has_end = True
            else:
                self._take(_json_object(event.data))

    def _take(self, event: dict[str, Any]) -> None:
        if event.get("error"):
            raise _error_in_stream(event["error"])
        choices = event.get("choices") or ()
        if any(_has_text(choice) for choice in choices):
            self._arrived.append(self._ended)
        if any(choice.get("finish_reason") for choice in choices):
            self._has_end = True
        self._usage = event.get("usage") or self._usage

    def result(self, model: str) -> Generation:
        """What was measured, at the end of the response. Raises ClientError for half a response."""
        if not self._has_end:
            raise StreamInterruptedError("the stream ended before its closing event")
        if not self._arrived:
            raise ProtocolError("expected text in the response, received none")
        counted = self._usage.get("completion_tokens")
        return Generation(
            model=model,
            ended=self._ended,
            arrived=tuple(self._arrived),
            prompt_tokens=self._usage.get("prompt_tokens"),
            output_tokens=counted or len(self._arrived),
            has_usage=bool(counted),
        )


def _json_object(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProtocolError(f"expected JSON in an event, received {data[:80]!r}")
    return value


def _has_text(choice: dict[str, Any]) -> bool:
    """Whether a choice holds new text: of a completion, a chat, or a chat's reasoning."""
    delta = choice.get("delta") or {}
    names = ("content", "reasoning_content", "reasoning")
    return bool(choice.get("text")) or any(delta.get(name) for name in names)


def _error_in_stream(error: object) -> ApiError:
    """The error of an event; the status line was sent as 200 before it."""
    fields = error if isinstance(error, dict) else {"message": str(error)}
    code = fields.get("code")
    details = ErrorDetails(
        message=str(fields.get("message") or "the server reported an error"),
        code=None if code is None else str(code),
        type=None if fields.get("type") is None else str(fields["type"]),
    )
    return details.to_error(BY_CODE.get(details.code or "", 500))
