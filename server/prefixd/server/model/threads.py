"""Threads of torch: at most one thread of the process runs parallel regions at a time.

libgomp counts the threads that it manages in the whole process. When a second thread starts a
parallel region, it gets a pool of its own; then there are more than there are cores, and from then
on every barrier waits in the kernel instead of spinning first: a step takes up to twice as long. A
pool lasts as long as the thread that started it, so a thread that ends leaves none behind.
"""

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import torch

Result = TypeVar("Result")

_INTERRUPTED_S = 5.0
"""How long an interrupted thread may take to end: it does between two of its operations."""


def limit_thread() -> None:
    """Let the calling thread compute alone from now on: it starts no parallel region.

    Threads that use torch for the first time after this do the same, unless they ask for more.
    """
    _set_num_threads(1)


def use_threads(count: int) -> None:
    """Let the operations of the calling thread run on ``count`` threads from now on."""
    _set_num_threads(count)
    if count > 1:  # the number that new threads begin with must not stay ``count``
        run_in_thread(limit_thread)


def compute(function: Callable[[], Result], *, threads: int) -> Result:
    """Call ``function`` in a thread that uses ``threads`` threads, and that ends with it."""

    def call() -> Result:
        use_threads(threads)
        return function()

    return run_in_thread(call)


def run_in_thread(function: Callable[[], Result]) -> Result:
    """Call ``function`` in a new thread, and wait for it.

    When a signal ends the wait, as Ctrl-C does, ``function`` is interrupted by SystemExit, so that
    its temporary folders and compilers go too. A thread that does not end within seconds then is
    left alone: it is a daemon, and the process does not wait for it.
    """
    result: Future[Result] = Future()
    ended = threading.Event()

    def call() -> None:
        if ended.is_set():
            return
        try:
            value = function()
        except BaseException as error:  # noqa: BLE001 - raised where the result is read
            result.set_exception(error)
        else:
            result.set_result(value)

    thread = threading.Thread(target=call, name="compute", daemon=True)
    try:
        thread.start()  # the signal may come here, before or after the thread runs
        return result.result()
    finally:
        ended.set()  # first: a thread without an identity has not begun, and does not begin now
        if not result.done():
            _interrupt(thread)
        with suppress(RuntimeError):  # it has not begun
            thread.join(_INTERRUPTED_S)  # its pool ends with it


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in another thread that has begun, once it runs Python code."""
    ident = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))


def _set_num_threads(count: int) -> None:
    # torch gives each thread, at its first parallel operation, the number that any thread has set
    # last: a number that was set before is lost then. Reading it counts as first operation.
    torch.get_num_threads()
    torch.set_num_threads(count)
