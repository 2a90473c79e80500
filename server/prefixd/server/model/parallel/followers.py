"""Rank 0's side of the other ranks: start them, send them calls, know when one is lost."""

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from prefixd.server.model.parallel.outcome import Outcome, raise_failures
from prefixd.server.model.parallel.plan import Job
from prefixd.server.model.parallel.rank import RankModel, join, load_rank, open_store

log = logging.getLogger(__name__)

LOAD = "load"
"""The first call: join the group and load the model."""

PING, END = "ping", "end"
"""Messages that are no calls: to be sent back, and to end at once."""

_CHECK_EVERY_S = 1.0
_IMPORTING_S = 120.0
"""How long a follower may take until it responds at all: first it imports torch."""

_FAILED_GRACE_S = 10.0
"""When a call has failed on one rank, how long the others may take to end it: in a collective call
they wait for that rank."""

_ENDING_S = 3.0

_FOLLOWER = "prefixd.server.model.parallel.follower"


class RankLost(RuntimeError):
    """A rank died or hangs; the message names it. No call can succeed any more."""


@dataclass(slots=True)
class _Follower:
    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: Connection
    heard: float


@dataclass(slots=True, eq=False)
class _Call:
    """A call that has not ended on all ranks; times are of ``time.monotonic``."""

    began: float
    limit_s: float | None
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    failed: float | None = None


class Followers:
    """The processes of ranks 1 and up. One thread makes calls; another watches the processes."""

    def __init__(self, job: Job, *, hung_s: float, on_lost: Callable[[str], None]) -> None:
        """Start them. When one ends, does not respond for ``hung_s`` seconds, or a pass takes
        longer, all are killed and ``on_lost`` is called with the reason, on a thread of this
        object."""
        self.lost: str | None = None
        self._store = open_store(job.ranks)
        self._job = replace(job, port=self._store.port)
        self._hung_s = hung_s
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._num_calls = 0
        self._closing = False
        self._followers = [self._start(rank) for rank in range(1, job.ranks)]
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def _start(self, rank: int) -> _Follower:
        own, its = Pipe()
        ranks = self._job.ranks
        numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        with its:
            process = subprocess.Popen(  # noqa: S603  # this program itself
                [sys.executable, "-m", _FOLLOWER, str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **numbers},
            )
        own.send((self._job, rank))
        log.info("rank %d of %d is process %d", rank, ranks, process.pid)
        return _Follower(rank, process, own, heard=time.monotonic() + _IMPORTING_S)

    # -- calls, from one thread ----

    def load(self) -> RankModel:
        """Load the model on all ranks. Raises as ``load_rank`` does, and RankLost."""
        number = self.begin(LOAD, limit_s=None)
        try:
            join(self._job, 0, store=self._store)
            model = load_rank(self._job)
        except Exception:
            self.close()  # before others fail without this rank, and seem to be the cause
            raise
        raise_failures(self.end(number, Outcome()))
        return model

    def run(self, name: str, *arguments: Any) -> int:
        """Have every follower call a method of its runner, of at most ``hung_s`` seconds."""
        return self.begin(name, *arguments, limit_s=self._hung_s)

    def begin(self, name: str, *arguments: Any, limit_s: float | None) -> int:
        """Have every follower call ``name``; returns the number of the call. Raises RankLost."""
        message = pickle.dumps((name, arguments), protocol=pickle.HIGHEST_PROTOCOL)
        with self._changed:
            self._raise_if_lost()
            self._num_calls += 1
            self._calls[self._num_calls] = _Call(time.monotonic(), limit_s)
        self._send(message)
        return self._num_calls

    def end(self, number: int, own: Outcome) -> dict[int, Outcome]:
        """Wait until a call has ended on all ranks, and return how. Raises RankLost."""
        with self._changed:
            self._note(number, 0, own)
            self._changed.wait_for(lambda: self.lost or not self._busy_ranks(number))
            self._raise_if_lost()
            return self._calls.pop(number).outcomes

    def _busy_ranks(self, number: int) -> list[int]:
        return [r for r in range(self._job.ranks) if r not in self._calls[number].outcomes]

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise RankLost(self.lost)

    def _send(self, message: bytes) -> None:
        with self._sending:
            for follower in self._followers:
                with suppress(OSError):  # it ended; the watcher reads the end of its pipe
                    follower.pipe.send_bytes(message)

    def _note(self, number: int, rank: int, outcome: Outcome) -> None:
        call = self._calls.get(number)
        if call is not None:
            call.outcomes[rank] = outcome
            if outcome.kind != "ok" and call.failed is None:
                call.failed = time.monotonic()
            self._changed.notify_all()

    # -- the watcher's thread ----

    def _watch(self) -> None:
        interval = min(_CHECK_EVERY_S, self._hung_s / 4)
        pipes = {follower.pipe: follower for follower in self._followers}
        looked = time.monotonic()
        while self.lost is None and not self._closing:
            for pipe in wait(list(pipes), timeout=interval):
                self._receive(pipes[pipe])  # type: ignore[index]  # no sockets, no descriptors
            now = time.monotonic()
            if now - looked >= interval:
                self._look(now, paused_s=now - looked - interval)
                looked = now

    def _receive(self, follower: _Follower) -> None:
        try:
            message = follower.pipe.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                follower.process.wait(_ENDING_S)
            self._lose(f"rank {follower.rank} {_ending(follower.process.returncode)}")
            return
        follower.heard = time.monotonic()
        if message != PING:
            number, outcome = message
            with self._changed:
                self._note(number, follower.rank, outcome)

    def _look(self, now: float, *, paused_s: float) -> None:
        """Ask for signs of life, and look for what is overdue. ``paused_s`` is how long this
        process was stopped, and perhaps the whole machine."""
        with self._changed:
            for call in self._calls.values():
                call.began += paused_s
        for follower in self._followers:
            follower.heard += paused_s
        # While a call is being sent, a follower reads it, or has stopped doing so.
        if self._sending.acquire(blocking=False):
            self._sending.release()
            self._send(pickle.dumps(PING))
        reason = next(self._overdue(now), None)
        if reason is not None:
            self._lose(reason)

    def _overdue(self, now: float) -> Iterator[str]:
        for follower in self._followers:
            if now - follower.heard > self._hung_s:
                yield f"rank {follower.rank} has not responded for {now - follower.heard:.0f} s"
        with self._changed:
            calls = {call: self._busy_ranks(n) for n, call in self._calls.items()}
        for call, busy in calls.items():
            if busy and call.failed is not None and now - call.failed > _FAILED_GRACE_S:
                rank, cause = next((r, o) for r, o in call.outcomes.items() if o.kind != "ok")
                yield f"rank {rank} failed while others wait for it: {cause.message}"
            if busy and call.limit_s is not None and now - call.began > call.limit_s:
                ranks = ", ".join(map(str, busy))
                yield f"a pass has not ended for {now - call.began:.0f} s on rank {ranks}"

    def _lose(self, reason: str) -> None:
        with self._changed:
            if self._closing or self.lost is not None:
                return
            self.lost = reason
            on_lost = self._on_lost
            self._changed.notify_all()
        log.error("the model cannot be run any more: %s", reason)
        for follower in self._followers:
            follower.process.kill()  # ends calls that wait for it, here too
        on_lost(reason)

    # -- the end ----

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call ``on_lost`` in place of the function before; at once where a rank is lost."""
        with self._changed:
            self._on_lost = on_lost
            lost = self.lost
        if lost is not None:
            on_lost(lost)

    def close(self) -> None:
        """End the followers, within seconds. No call may be made any more."""
        with self._changed:
            self._closing = True
        if self._sending.acquire(timeout=_ENDING_S):  # else one does not read what it is sent
            self._sending.release()
            self._send(pickle.dumps(END))
        deadline = time.monotonic() + _ENDING_S
        for follower in self._followers:
            try:
                follower.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
        self._watcher.join()
        for follower in self._followers:
            follower.pipe.close()
        if self.lost is None and dist.is_initialized():
            dist.destroy_process_group()


def _ending(status: int | None) -> str:
    if status is None:
        return "closed its pipe"
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
