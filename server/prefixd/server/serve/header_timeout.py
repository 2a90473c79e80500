"""Connections whose request head never ends: uvicorn would wait for them, and keep what came."""

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 1024


def impatient(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, closing a connection that has not sent a whole request head ``seconds``
    after it opened or began one, or has sent 64 KiB without its end. Between requests uvicorn's own
    keep-alive limit counts."""

    class Impatient(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_limit: TimerHandle | None = None
            self._head_bytes = 0

        def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            self._expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_came()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._head_limit is not None and self._head_bytes > MAX_HEAD_BYTES:
                self.transport.close()
                return
            self._head_bytes += len(data)
            super().data_received(data)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_head()

        def on_headers_complete(self) -> None:
            self._head_came()
            super().on_headers_complete()

        def _expect_head(self) -> None:
            if self._head_limit is None:
                self._head_bytes = 0
                self._head_limit = self.loop.call_later(seconds, self.transport.close)

        def _head_came(self) -> None:
            if self._head_limit is not None:
                self._head_limit.cancel()
                self._head_limit = None

    return Impatient
