"""The number of threads that torch uses in each thread, and how many cores there are."""

import signal
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from traceback import format_stack
from unittest.mock import Mock

import pytest
import torch

from prefixd.server.model import cgroups, cores
from prefixd.server.model.threads import compute, limit_thread, run_in_thread, use_threads


def test_a_limited_thread_keeps_its_number_when_another_thread_sets_its_own() -> None:
    is_limited, is_set = threading.Event(), threading.Event()
    seen: list[int] = []

    def first() -> None:
        limit_thread()
        is_limited.set()
        assert is_set.wait(30)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=first)
    thread.start()
    assert is_limited.wait(30)
    run_in_thread(lambda: torch.set_num_threads(3))
    is_set.set()
    thread.join()
    assert seen == [1]


def test_only_the_thread_that_sets_a_number_has_it() -> None:
    def engine() -> tuple[int, int, int]:
        use_threads(3)
        before = torch.get_num_threads()
        return before, run_in_thread(torch.get_num_threads), torch.get_num_threads()

    assert compute(engine, threads=2) == (3, 1, 3)
    assert run_in_thread(torch.get_num_threads) == 1


def test_what_a_computing_thread_raises_is_raised_where_it_was_called() -> None:
    def fail() -> None:
        raise KeyError("no such model")

    with pytest.raises(KeyError, match="no such model"):
        compute(fail, threads=1)


def test_ctrl_c_interrupts_the_computing_thread_and_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefixd.server.model.threads._INTERRUPTED_S", 60.0)
    ended: list[str] = []
    caller = threading.get_ident()

    def load() -> None:
        try:
            while not any(
                "result.result()" in line for line in format_stack(sys._current_frames()[caller])
            ):
                pass
            signal.pthread_kill(caller, signal.SIGINT)
            while True:
                time.sleep(0.001)
        finally:
            time.sleep(0.1)
            ended.append("its temporary folder is removed")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            compute(load, threads=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["its temporary folder is removed"]


@pytest.mark.parametrize("begins", ["before the signal", "after the signal", "never"])
def test_ctrl_c_while_a_computing_thread_starts_leaves_none_that_computes(
    begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, threads, start = threading.Event(), list[threading.Thread](), threading.Thread.start
    ended: list[str] = []

    def load() -> None:
        try:
            begun.set()
            while True:
                time.sleep(0.001)
        finally:
            time.sleep(0.1)
            ended.append("its temporary folder is removed")

    def interrupted_start(thread: threading.Thread) -> None:
        threads.append(thread)
        if begins == "before the signal":
            start(thread)
            assert begun.wait(30)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prefixd.server.model.threads._INTERRUPTED_S", 60.0)
        patch.setattr(threading.Thread, "start", interrupted_start)
        with pytest.raises(KeyboardInterrupt):
            run_in_thread(load)
    if begins == "after the signal":
        start(threads[0])
        threads[0].join(30)
    assert not threads[0].is_alive()
    assert len(ended) == begun.is_set() == (begins == "before the signal")


def test_an_interrupt_after_the_result_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_result = Future.set_result

    def interrupted(future: Future[int], value: int) -> None:
        set_result(future, value)
        raise SystemExit

    monkeypatch.setattr(Future, "set_result", interrupted)
    monkeypatch.setattr(threading, "excepthook", hook := Mock())
    assert run_in_thread(lambda: 7) == 7
    assert [call.args[0].exc_type for call in hook.mock_calls] == [SystemExit]  # which it ignores


@pytest.mark.parametrize(
    ("allowed", "siblings", "files", "expected"),
    [
        ({0, 1, 2, 3}, {0: "0", 1: "1", 2: "2", 3: "3"}, {}, 4),
        ({0, 1, 2, 3}, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, {}, 2),
        ({1, 3}, {1: "1,3", 3: "1,3"}, {}, 1),
        ({0, 1, 2}, {}, {}, 3),
        (
            {0, 1, 2, 3},
            {},
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cgroup/a/b/cpu.max": "max 100000\n",
                "cgroup/a/cpu.max": "250000 100000\n",
            },
            2,
        ),
        (
            {0, 1},
            {},
            {"proc/self/cgroup": "0::/a\n", "cgroup/a/cpu.max": "50000 100000\n"},
            1,
        ),
        (
            {0, 1, 2, 3},
            {},
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n",
                "cgroup/cpu/x/cpu.cfs_quota_us": "300000\n",
                "cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
    ],
    ids=["all", "hyperthreads", "one core", "unknown cores", "cgroup 2", "half a core", "cgroup 1"],
)
def test_usable_cores_follow_affinity_quota_and_physical_cores(
    *,
    allowed: set[int],
    siblings: dict[int, str],
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lists = {f"cpu/cpu{cpu}/topology/thread_siblings_list": v for cpu, v in siblings.items()}
    for name, content in {**files, **lists}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroups, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_CPUS", tmp_path / "cpu")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed)
    assert cores.usable_cores() == expected
    for requested, threads in (("1", 1), ("64,2", expected), ("", expected), ("two", expected)):
        monkeypatch.setenv("OMP_NUM_THREADS", requested)
        assert cores.default_threads() == threads
