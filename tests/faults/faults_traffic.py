"""Requests as clients send them, and their responses as plain data."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.faults.faults_model import Content, ids_of

HANG_S = 90.0
"""A request without a response after this time hangs: all loads here finish in seconds."""


@dataclass
class Answer:
    """The outcome of a generation request, with a text for each choice. ``error`` is the error
    object, from the body or from the last event of the stream; ``complete``: the stream had its
    last line."""

    status: int
    texts: list[str] = field(default_factory=list)
    prefix: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    cached: int = 0
    retry_after: str | None = None
    complete: bool = True
    reasons: list[str | None] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None and self.complete

    @property
    def tokens(self) -> list[list[int]]:
        """The generated text as token ids."""
        return [ids_of(text) for text in self.texts]

    @property
    def code(self) -> str | None:
        return None if self.error is None else self.error["code"]

    @property
    def message(self) -> str:
        return "" if self.error is None else self.error["message"]

    @property
    def digest(self) -> str | None:
        return None if self.prefix is None else str(self.prefix["digest"])


@asynccontextmanager
async def caller(
    url: str, key: str, *, connections: int = 100
) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of one tenant."""
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    async with httpx2.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        timeout=httpx2.Timeout(HANG_S, connect=30),
        limits=limits,
    ) as client:
        yield client


def greedy(
    model: str, prompt: Sequence[int] | Sequence[Sequence[int]], count: int, **more: Any
) -> dict[str, Any]:
    """The body of a completion that generates exactly ``count`` tokens."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def in_parts(body: dict[str, Any], content: Content) -> dict[str, Any]:
    """A body of ``greedy`` as a chat, with virtual tokens of a soft prompt inside the prompt."""
    more = {name: value for name, value in body.items() if name != "prompt"}
    return {**more, "messages": content.messages(body["prompt"])}


async def complete(client: httpx2.AsyncClient, body: dict[str, Any]) -> Answer:
    """Send a request without streaming; with messages as a chat."""
    response = await client.post(_path(body), json=body)
    parsed = response.json()
    if response.status_code != 200:
        return _error(response, parsed)
    choices = sorted(parsed["choices"], key=lambda choice: choice["index"])
    return Answer(
        200,
        texts=[_text(choice, "message") for choice in choices],
        prefix=parsed["prefix"],
        cached=_cached(parsed["usage"]),
        reasons=[choice["finish_reason"] for choice in choices],
    )


async def stream(
    client: httpx2.AsyncClient,
    body: dict[str, Any],
    *,
    leave_after: int | None = None,
    begun: asyncio.Event | None = None,
) -> Answer:
    """Send a streaming request; disconnect after ``leave_after`` events (0: before the first).
    ``begun`` is set at the first event."""
    several = isinstance(body.get("prompt", [0])[0], list)
    choices = body.get("n", 1) * (len(body["prompt"]) if several else 1)
    streaming_body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    answer = Answer(200, texts=[""] * choices, complete=False, reasons=[None] * choices)
    async with client.stream("POST", _path(body), json=streaming_body) as response:
        if response.status_code != 200:
            return _error(response, json.loads(await response.aread()))
        seen = 0
        async for line in response.aiter_lines():
            if leave_after is not None and seen >= leave_after:
                break
            if not line:
                continue
            seen += 1
            if begun is not None:
                begun.set()
            if line == "data: [DONE]":
                answer.complete = True
                break
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                answer.error = event["error"]
                continue
            answer.prefix = event["prefix"]
            if event.get("usage"):
                answer.cached = _cached(event["usage"])
            for choice in event["choices"]:
                answer.texts[choice["index"]] += _text(choice, "delta")
                answer.reasons[choice["index"]] = choice["finish_reason"]
    return answer


def _path(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def _text(choice: dict[str, Any], message: str) -> str:
    """The text of a choice; that of a chat is in its ``message`` or "delta"."""
    text = choice[message].get("content") if message in choice else choice["text"]
    return text or ""


def _error(response: httpx2.Response, parsed: Any) -> Answer:
    return Answer(
        response.status_code,
        error=parsed["error"],
        retry_after=response.headers.get("retry-after"),
    )


def _cached(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)
