"""The order in which the writers of one process get a SQLite file."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from sqlalchemy.exc import TimeoutError as PoolTimeout

from prefixd.store.db.writer_turns import WriterTurns


class Writers:
    """Threads that write in turns; ``order`` is that in which they did."""

    def __init__(self, pool: ThreadPoolExecutor, turns: WriterTurns) -> None:
        self.pool, self.turns = pool, turns
        self.order: list[str] = []

    def add(self, name: str, *, relaxed: bool) -> "Future[None]":
        """Start a writer, and return when it waits."""
        before = self.turns.num_waiting
        future = self.pool.submit(self._write, name, relaxed=relaxed)
        wait_until(lambda: self.turns.num_waiting > before)
        return future

    def _write(self, name: str, *, relaxed: bool) -> None:
        with self.turns.take(relaxed=relaxed):
            self.order.append(name)


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.001)


@pytest.fixture
def writers() -> Iterator[Writers]:
    with ThreadPoolExecutor(8) as pool:
        yield Writers(pool, WriterTurns(30.0))


def test_writers_of_a_kind_keep_their_order_and_the_kinds_alternate(writers: Writers) -> None:
    with writers.turns.take(relaxed=False):
        futures = [writers.add(f"change {n}", relaxed=False) for n in range(3)]
        futures += [writers.add(f"count {n}", relaxed=True) for n in range(2)]
    for future in futures:
        future.result()
    assert writers.order == ["count 0", "change 0", "count 1", "change 1", "change 2"]


def test_a_writer_that_writes_again_waits_for_those_that_wait(writers: Writers) -> None:
    with writers.turns.take(relaxed=False):
        future = writers.add("other", relaxed=False)
    with writers.turns.take(relaxed=False):
        writers.order.append("again")
    future.result()
    assert writers.order == ["other", "again"]


def test_a_writer_that_waited_too_long_leaves_its_turn_to_the_next() -> None:
    turns = WriterTurns(0.01)
    with turns.take(relaxed=True), pytest.raises(PoolTimeout), turns.take(relaxed=False):
        pass
    with turns.take(relaxed=False):
        assert turns.num_waiting == 0
