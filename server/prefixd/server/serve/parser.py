"""uvicorn's HTTP parser, for a server that ignores the header Upgrade."""

from collections.abc import Sequence
from typing import Any

import httptools

_FRAMING = (b"transfer-encoding", b"content-length")


class UpgradeIgnoringParser:
    """A parser that reads a request with Upgrade, or CONNECT, as any other request.

    A server may ignore Upgrade (RFC 9110, section 7.8), and clients offer HTTP/2 in this way with
    bodies. httptools ends the request at its head and leaves its body to another protocol; what
    feeds it on would read the body as the next request.
    """

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._inner = _parser(protocol)
        self._framing: bytes | None = None

    @property
    def body_follows(self) -> bool:
        """Whether httptools took the request for complete, though it has a body."""
        return self._framing is not None

    def end_head(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Take the headers, names in lower case, when their end was parsed."""
        if self._inner.should_upgrade():
            lines = [b"%s: %s\r\n" % header for header in headers if header[0] in _FRAMING]
            self._framing = b"".join(lines) or None

    def feed_data(self, data: bytes) -> None:
        """Parse ``data``. Raises httptools.HttpParserError."""
        while data:
            try:
                self._inner.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._framing is not None:
                    self._read_body(self._framing)
            else:
                return

    def should_upgrade(self) -> bool:
        """False: there is no other protocol."""
        return False

    def should_keep_alive(self) -> bool:
        """As httptools."""
        return self._inner.should_keep_alive()

    def get_http_version(self) -> str:
        """As httptools."""
        return self._inner.get_http_version()

    def get_method(self) -> bytes:
        """As httptools."""
        return self._inner.get_method()

    def _read_body(self, framing: bytes) -> None:
        """Go on with a parser that has read the same head, without Upgrade."""
        after_head = _AfterHead(self._protocol)
        self._framing = None
        self._inner = _parser(after_head)
        self._inner.feed_data(b"POST / HTTP/1.1\r\nhost: _\r\n" + framing + b"\r\n")
        after_head.in_head = False


class _AfterHead:
    """The callbacks of ``protocol``, which has handled the first head already."""

    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self.in_head = True

    def on_message_begin(self) -> None:
        if not self.in_head:
            self._protocol.on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self.in_head:
            self._protocol.on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_head:
            self._protocol.on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self.in_head:
            self._protocol.on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._protocol.on_body(body)

    def on_message_complete(self) -> None:
        self._protocol.on_message_complete()


def _parser(protocol: Any) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    # As uvicorn: more requests may follow in the same data as one with Connection: close.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
