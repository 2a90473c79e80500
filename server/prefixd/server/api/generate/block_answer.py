"""Answers of shapes that are lists of blocks, whole or as events."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from pydantic_core import to_json

from prefixd.server.api.generate.answer_blocks import Block, BlockReader, Change, settled
from prefixd.server.api.generate.service import Running
from prefixd.server.errors import PrefixdError


def named_event(payload: dict[str, Any]) -> bytes:
    """One server-sent event, named by the ``type`` of its payload."""
    return b"event: %b\ndata: %b\n\n" % (payload["type"].encode(), to_json(payload))


class BlockAnswer(ABC):
    """An ``Answer`` to a request with one choice."""

    def __init__(self, running: Running) -> None:
        self.admitted, self.record = running.admitted, running.record
        self.reader = BlockReader(running.admitted.syntax)
        self._events = running.events

    @abstractmethod
    def body(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """The response that has ended with these blocks."""

    @abstractmethod
    def opening(self) -> bytes:
        """The events before the first change."""

    @abstractmethod
    def written(self, change: Change) -> bytes:
        """The events of a change."""

    @abstractmethod
    def ending(self, error: PrefixdError | None) -> bytes:
        """As of Answer."""

    async def whole(self) -> dict[str, Any]:
        """As of Answer."""
        async for batch in self._events:
            for _, event in batch:
                self.reader.push(event)
        return self.body(settled(self.reader.blocks))

    async def chunks(self) -> AsyncGenerator[bytes]:
        """As of Answer."""
        opening = self.opening()
        async for batch in self._events:
            changes = [change for _, event in batch for change in self.reader.push(event)]
            encoded = opening + b"".join(map(self.written, changes))
            opening = b""
            if encoded:
                yield encoded
