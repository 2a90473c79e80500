"""A follower: the process of a rank other than 0, which ``followers.py`` starts.

It runs the calls that arrive and reports how each ended. When rank 0 ends, however it does, the
pipe ends, and with it this process: also within a pass, because a thread of its own reads the pipe.
"""

import logging
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn

from transformers.utils.logging import disable_progress_bar

from prefixd.server.model.parallel.followers import END, LOAD, PING
from prefixd.server.model.parallel.outcome import Outcome
from prefixd.server.model.parallel.plan import Job
from prefixd.server.model.parallel.rank import join, load_rank
from prefixd.server.model.runner import Runner
from prefixd.server.model.threads import use_threads

log = logging.getLogger(__name__)


class Follower:
    """Runs the calls of rank 0 in the order in which they arrive."""

    def __init__(self, pipe: Connection) -> None:
        """The first message on ``pipe`` is the job and the rank."""
        self._pipe = pipe
        self._job: Job
        self._job, self._rank = pipe.recv()
        self._sending = threading.Lock()
        self._calls: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
        self._runner: Runner

    def run(self) -> NoReturn:
        """Until rank 0 ends."""
        self._send(PING)
        threading.Thread(target=self._read, name="read", daemon=True).start()
        use_threads(self._job.threads)
        number = 0
        while True:
            name, arguments = self._calls.get()
            number += 1
            self._send((number, self._outcome(name, arguments)))

    def _outcome(self, name: str, arguments: tuple[Any, ...]) -> Outcome:
        try:
            if name == LOAD:
                join(self._job, self._rank)
                self._runner = load_rank(self._job).runner
                return Outcome()
            return Outcome.of(getattr(self._runner, name)(*arguments))
        except Exception as error:  # noqa: BLE001 - rank 0 makes one error of those of all ranks
            return Outcome.of(error)

    def _read(self) -> None:
        """Take calls, answer pings, end with rank 0. On a thread of its own."""
        try:
            while (message := self._pipe.recv()) != END:
                if message == PING:
                    self._send(PING)
                else:
                    self._calls.put(message)
        except (EOFError, OSError):
            pass
        except Exception:
            log.exception("rank %d cannot read a message", self._rank)
            os._exit(1)
        os._exit(0)  # the other thread may wait for ranks that have ended

    def _send(self, message: object) -> None:
        with self._sending:
            self._pipe.send(message)


def main() -> NoReturn:
    """``python -m prefixd.server.model.parallel.follower DESCRIPTOR`` of the pipe to rank 0."""
    for sig in (signal.SIGTERM, signal.SIGINT):  # sent to all: rank 0 drains, then ends this one
        signal.signal(sig, signal.SIG_IGN)
    logging.basicConfig(level=logging.ERROR)  # rank 0 logs the rest
    disable_progress_bar()
    Follower(Connection(int(sys.argv[1]))).run()


if __name__ == "__main__":
    main()
