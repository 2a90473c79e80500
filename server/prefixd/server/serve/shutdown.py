"""The shutdown of a server: a signal starts a drain, which ends with the process.

::

    signal ──> no new generations, not ready ──> all requests ended, or the drain timeout,
               (the socket stays open)           or a second signal
                                                   │
           exit 0 <── uvicorn closes <── engine stops <── unfinished streams get their last event
                      (CLOSING_S)        (CLOSING_S)
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn

from prefixd.server.api.drain_state import DrainState
from prefixd.server.engine.engine import Engine
from prefixd.server.serve.http import HttpServer

log = structlog.get_logger("prefixd")

CLOSING_S = 5
"""Timeout for the engine to stop, and then again for the connections to close, in seconds."""

LONGEST_CLOSING_S = 2 * CLOSING_S
"""How long a shutdown can take after the drain timeout, in seconds."""

_STATUS = {signal.SIGTERM: 0, signal.SIGINT: 130}
"""The exit status at each signal before a server runs."""

_POLL_S = 0.05
_REFRESH_S = 1.0


class DrainingServer(HttpServer):
    """uvicorn's server with a drain before its own shutdown. Runs in the main thread of a process
    that exits afterwards."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_state: DrainState,
        engine: Engine,
        drain_timeout_s: float,
        closing_s: int = CLOSING_S,
    ) -> None:
        """Running requests get ``drain_timeout_s`` to finish; then the engine and the connections
        get ``closing_s`` each."""
        config.timeout_graceful_shutdown = closing_s
        super().__init__(config)
        self._drain_state = drain_state
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._closing_s = closing_s
        self._second_signal = False
        self.failure: str | None = None

    def fail(self, reason: str) -> None:
        """End at once: no request can succeed any more. ``failure`` is then the reason. Safe in any
        thread."""
        self.failure = f"the server ends: {reason}"
        self._drain_state.close(self.failure)
        self._engine.drain(self.failure)
        self._second_signal = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain at the first signal, end the drain at the next.

        uvicorn would raise the signal again at the end; a shutdown on request is not a failure, so
        the exit status here is 0.
        """
        del sig, frame
        self._second_signal = self.should_exit
        self._drain_state.close()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then let uvicorn close everything."""
        self._drain_state.close()
        await self._drain(set(self.server_state.tasks))
        _exit_within(2 * self._closing_s)
        self._drain_state.end_running()
        await self._stop_engine()
        await super().shutdown(sockets)
        log.info("stopped")

    async def _drain(self, requests: set[asyncio.Task[None]]) -> None:
        """Wait for the requests that were running at the signal. Later ones get a response too, but
        do not extend the drain: clients that retry could do so without limit."""
        self._engine.drain()
        log.info("draining", requests=len(requests), timeout=self._drain_timeout_s)
        deadline = time.monotonic() + self._drain_timeout_s
        refresh = 0.0
        while requests and not self._second_signal and time.monotonic() < deadline:
            if time.monotonic() > refresh:
                refresh = time.monotonic() + _REFRESH_S
                await self.on_tick(0)  # keeps the Date header right, as uvicorn's own loop does
            _, requests = await asyncio.wait(requests, timeout=_POLL_S)
        if requests:
            cause = self.failure or ("a second signal" if self._second_signal else "the timeout")
            log.warning("ending what still runs", requests=len(requests), because=cause)

    async def _stop_engine(self) -> None:
        """Stop the engine in a thread: it joins its own, and one may hang in the device."""
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def stop() -> None:
            self._engine.stop()
            with suppress(RuntimeError):  # the loop is closed: it took too long
                loop.call_soon_threadsafe(stopped.set)

        threading.Thread(target=stop, name="stop-engine", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), self._closing_s)


@contextmanager
def exits_at_signals() -> Iterator[None]:
    """Exit at SIGTERM with status 0 and at SIGINT with 130, until a server replaces the handlers:
    while the model loads there is nothing to drain."""

    def exit_now(sig: int, frame: FrameType | None) -> None:
        del frame
        _exit_within(LONGEST_CLOSING_S)
        sys.exit(_STATUS[signal.Signals(sig)])

    before = {sig: signal.signal(sig, exit_now) for sig in _STATUS}
    try:
        yield
    except SystemExit as ended:
        if isinstance(ended.code, int):
            exit_process(ended.code)
        raise
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def exit_process(status: int = 0) -> NoReturn:
    """Exit without finalizing the interpreter: with torch loaded that takes seconds, and a thread
    that still computes would abort the process. Python ends such a thread when it asks for the
    interpreter again, inside of torch's code, which cannot be unwound there."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_within(timeout_s: float) -> None:
    """Exit with status 1 after ``timeout_s``, unless the process ends before: a step on the device
    or a request to the bucket may hang."""

    def exit_now() -> None:
        own = {threading.current_thread(), threading.main_thread()}
        threads = [thread.name for thread in threading.enumerate() if thread not in own]
        log.error("something hangs and does not end", threads=threads)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(timeout_s, exit_now)
    timer.name, timer.daemon = "last-resort", True
    timer.start()
