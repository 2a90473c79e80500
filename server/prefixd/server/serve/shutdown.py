"""The end of a server: a signal closes the intake, what runs gets its time, the rest is told.

::

    signal ──> no new answers, not ready ──> every request ended, or its time is up, or a
               (the socket listens on)       second signal
                                               │
           exit 0 <── uvicorn closes <── engine stops <── unfinished answers get their last event
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
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn

from prefixd.server.api.drain_state import DrainState
from prefixd.server.engine.engine import Engine

log = structlog.get_logger("prefixd")

CLOSING_S = 5
"""How long the engine gets to stop, and after it the connections to close."""

LONGEST_CLOSING_S = 2 * CLOSING_S
"""What a server can take to end beyond its patience, in the worst case."""

_POLL_S = 0.05
_REFRESH_S = 1.0


class DrainingServer(uvicorn.Server):
    """uvicorn's server with a drain before its own shutdown. For the main thread of a process
    that ends with it."""

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_state: DrainState,
        engine: Engine,
        patience: float,
        closing: int = CLOSING_S,
    ) -> None:
        """``patience`` is how long running requests may go on, in seconds; then the engine and
        the connections have ``closing`` each."""
        config.timeout_graceful_shutdown = closing
        super().__init__(config)
        self._intake = drain_state
        self._engine = engine
        self._patience = patience
        self._closing = closing
        self._hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal closes the intake, the next ends the waiting.

        uvicorn would note the signal and raise it again at the end: a server that was asked to
        end and did has not failed, so its status is 0.
        """
        del sig, frame
        self._hurried = self.should_exit
        self._intake.close()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then let uvicorn close everything."""
        self._intake.close()
        await self._let_finish(set(self.server_state.tasks))
        _insist(2 * self._closing)
        self._intake.end_running()
        await self._stop_engine()
        await super().shutdown(sockets)
        log.info("stopped")

    async def _let_finish(self, requests: set[asyncio.Task[None]]) -> None:
        """Wait for the requests that were running when the signal came. Those that come after it
        are answered too, but not waited for: a crowd that tries again must not keep us here."""
        self._engine.drain()
        log.info("draining", requests=len(requests), timeout=self._patience)
        deadline = time.monotonic() + self._patience
        refresh = 0.0
        while requests and not self._hurried and time.monotonic() < deadline:
            if time.monotonic() > refresh:
                refresh = time.monotonic() + _REFRESH_S
                await self.on_tick(0)  # keeps the Date header right, as uvicorn's own loop does
            _, requests = await asyncio.wait(requests, timeout=_POLL_S)
        if requests:
            why = "a second signal" if self._hurried else "the timeout"
            log.warning("ending what still runs", requests=len(requests), because=why)

    async def _stop_engine(self) -> None:
        """Stop the engine, off the loop: it joins threads, and one may hang in the device."""
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

        def stop() -> None:
            self._engine.stop()
            with suppress(RuntimeError):  # the loop is closed: it took too long
                loop.call_soon_threadsafe(stopped.set)

        threading.Thread(target=stop, name="stop-engine", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), self._closing)


def end_process() -> NoReturn:
    """End this process with status 0, after a shutdown in good order, without taking the
    interpreter apart: with torch in it that takes seconds, and nothing is left to be done."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave_at_signal() -> None:
    """End this process with status 0 at SIGTERM: before there is a server, nothing has to drain."""

    def leave(sig: int, frame: FrameType | None) -> None:
        del sig, frame
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)


def _insist(limit: float) -> None:
    """End this process in ``limit`` seconds, whatever hangs by then: a step on the device, a
    request to the bucket. Does nothing if the process ends by itself before."""

    def end() -> None:
        log.error("something hangs and does not end", threads=[t.name for t in _others()])
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(limit, end)
    timer.name, timer.daemon = "last-resort", True
    timer.start()


def _others() -> list[threading.Thread]:
    mine = {threading.current_thread(), threading.main_thread()}
    return [thread for thread in threading.enumerate() if thread not in mine]
