"""How a connection ends: the client can read the whole answer, and cannot hold the connection."""

import asyncio
import fcntl
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LINGER_S = 1.0
"""How long a closed connection still receives, in seconds."""

LINGER_BYTES = 64 * 1024
"""How much a closed connection still receives. After that the client has to wait."""

_CHECKS = 4
"""Checks of a client's progress in one write timeout."""


class LingeringTransport(asyncio.Transport):
    """A transport whose ``close`` lets the client read what was written before.

    A plain close answers bytes that arrive afterwards with a reset, and with it the client may lose
    an answer that it has not read yet. Here ``close`` shuts the sending side, discards up to
    LINGER_BYTES for LINGER_S at most, and then closes.

    A client that takes nothing of what was written for ``write_timeout_s`` is disconnected:
    ``on_stall`` is called first. Taken is what the client's kernel acknowledged, so a slow client
    that reads on stays connected, and one that stopped is noticed long before the buffers of both
    kernels are full.
    """

    def __init__(
        self,
        inner: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        *,
        write_timeout_s: float,
        on_stall: Callable[[], None],
    ) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._write_timeout_s = write_timeout_s
        self._on_stall = on_stall
        self._lingering = False
        self._discarded = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._held: list[bytes] | None = None
        self._written = 0
        self._taken = 0
        self._stalled_since = 0.0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``, unless the transport was closed."""
        if self._held is not None:
            self._held.append(bytes(data))
            return
        if self._lingering:
            return
        self._written += len(data)
        self._inner.write(data)
        if self._write_timer is None:
            self._taken = self._written - self._outstanding()
            self._stalled_since = self._loop.time()
            self._check_later()

    def hold(self) -> None:
        """Keep what is written from now on, until ``release``: then it is sent at once."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Send what was kept."""
        held, self._held = self._held, None
        if held and not self.is_closing():
            self.write(b"".join(held))

    def close(self) -> None:
        """Send what was written, then the end of the stream; close after LINGER_S, or when the
        client has closed."""
        if self.is_closing():
            return
        self.release()
        self._lingering = True
        self._inner.resume_reading()
        try:
            self._inner.write_eof()
        except OSError:  # the client has reset the connection
            self._inner.abort()
            return
        self._linger_timer = self._loop.call_later(LINGER_S, self._end_linger)

    def abort(self) -> None:
        """Close at once."""
        self._inner.abort()

    def discard(self, data: bytes) -> None:
        """Count bytes that arrived after ``close``."""
        self._discarded += len(data)
        if self._discarded > LINGER_BYTES:
            self._inner.pause_reading()

    def stop(self) -> None:
        """Stop the timers: the connection is lost."""
        for timer in (self._linger_timer, self._write_timer):
            if timer is not None:
                timer.cancel()

    def is_closing(self) -> bool:
        """Whether nothing can be written any more."""
        return self._lingering or self._inner.is_closing()

    def pause_reading(self) -> None:
        """Receive no more, until ``resume_reading`` or ``close``."""
        if not self._lingering:
            self._inner.pause_reading()

    def resume_reading(self) -> None:
        """Receive again."""
        if not self._lingering:
            self._inner.resume_reading()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of the inner transport."""
        return self._inner.get_extra_info(name, default)

    def _end_linger(self) -> None:
        if self._outstanding():
            # A reset now would take the rest of the answer. The write timeout bounds this.
            self._linger_timer = self._loop.call_later(LINGER_S, self._end_linger)
        else:
            self._inner.abort()

    def _check_later(self) -> None:
        self._write_timer = self._loop.call_later(
            self._write_timeout_s / _CHECKS, self._check_progress
        )

    def _check_progress(self) -> None:
        self._write_timer = None
        outstanding = self._outstanding()
        if not outstanding:
            return
        taken, now = self._written - outstanding, self._loop.time()
        if taken > self._taken:
            self._taken, self._stalled_since = taken, now
        elif now - self._stalled_since >= self._write_timeout_s:
            self._on_stall()
            self._inner.abort()
            return
        self._check_later()

    def _outstanding(self) -> int:
        """Bytes that were written and that the client's kernel has not acknowledged."""
        buffered = self._inner.get_write_buffer_size()
        number = self._inner.get_extra_info("socket").fileno()
        if number < 0:  # closed
            return buffered
        queued = bytearray(4)
        with suppress(OSError):  # not every kernel tells
            fcntl.ioctl(number, termios.TIOCOUTQ, queued)
        return buffered + int.from_bytes(queued, sys.byteorder)
