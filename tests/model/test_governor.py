"""How many threads compute, on a simulated machine with other processes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from prefixd.server.model import thread_control
from prefixd.server.model.governor import Governor
from prefixd.server.model.thread_control import CoreUse, ThreadControl

CORES = 2
SAMPLE_S = 0.2


def simulate(
    busy: Callable[[float], float], *, seconds: float, cores: int = CORES, fixed: int = 0
) -> tuple[float, list[int]]:
    """Work done, in seconds of one undisturbed thread, and the threads at each sample.

    ``busy(now)`` is how many cores others would use. Where more threads want to run than there are
    cores, each gets an equal share; those of a step wait for the slowest.
    """
    governor, work, chosen = Governor(cores), 0.0, []
    for number in range(int(seconds / SAMPLE_S)):
        now = number * SAMPLE_S
        threads = fixed or governor.threads
        others = busy(now)
        crowding = max(1.0, (threads + others) / cores)
        work += SAMPLE_S * threads * (1 - min(1.0, others) * (crowding > 1) / crowding)
        governor.observe(now=now, available=cores - others / crowding)
        chosen.append(threads)
    return work, chosen


def test_all_cores_are_used_while_they_are_free() -> None:
    work, threads = simulate(lambda _: 0.1, seconds=60)
    assert set(threads) == {2}
    assert work >= 1.5 * simulate(lambda _: 0.1, seconds=60, fixed=1)[0]


def test_next_to_a_busy_process_the_work_is_that_of_one_thread() -> None:
    work, threads = simulate(lambda _: 1.0, seconds=60)
    assert set(threads[3:]) == {1}
    assert work >= 0.9 * simulate(lambda _: 1.0, seconds=60, fixed=1)[0]


def test_threads_return_when_the_cores_are_free_again() -> None:
    _, threads = simulate(lambda now: 1.0 if 10 <= now < 20 else 0.0, seconds=30)
    assert set(threads[: int(10 / SAMPLE_S)]) == {2}
    assert set(threads[int(10.6 / SAMPLE_S) : int(20 / SAMPLE_S)]) == {1}
    assert set(threads[int(22 / SAMPLE_S) :]) == {2}


def test_a_process_that_runs_for_a_moment_changes_nothing() -> None:
    _, threads = simulate(lambda now: 1.0 if round(now / SAMPLE_S) % 10 == 0 else 0.0, seconds=30)
    assert set(threads) == {2}


def test_a_process_that_comes_and_goes_causes_fewer_and_fewer_changes() -> None:
    _, threads = simulate(lambda now: float(now % 4 < 2), seconds=240)
    changes = [i * SAMPLE_S for i in range(1, len(threads)) if threads[i] != threads[i - 1]]
    assert sum(time < 20 for time in changes) >= 2
    assert len(changes) <= 8
    assert sum(time >= 120 for time in changes) == 0


@pytest.mark.parametrize(("others", "expected"), [(1.0, 7), (3.2, 5), (7.9, 1), (20.0, 1)])
def test_each_core_that_others_need_is_one_thread_fewer(others: float, expected: int) -> None:
    governor = Governor(8)
    for number in range(20):
        threads = governor.observe(now=number * SAMPLE_S, available=8 - others)
    assert threads == expected


class Machine:
    """A clock and the time that others have spent on two cores."""

    cores = CORES

    def __init__(self) -> None:
        self.now = self.others = 0.0

    def others_s(self) -> float:
        return self.others

    def step(self, control: ThreadControl, *, busy: float = 0.0, seconds: float = 0.05) -> int:
        threads = control.before_step()
        self.now += seconds
        self.others += busy * seconds
        return threads


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(thread_control, "CoreUse", lambda: machine)
    monkeypatch.setattr("time.monotonic", lambda: machine.now)
    return machine


def test_the_number_of_threads_follows_the_use_of_the_cores(machine: Machine) -> None:
    control = ThreadControl(2, governed=True)
    assert {machine.step(control) for _ in range(40)} == {2}
    assert [machine.step(control, busy=1.0) for _ in range(40)][-20:] == [1] * 20
    assert [machine.step(control) for _ in range(60)][-20:] == [2] * 20
    assert control.after_step()[:2] == (2, 2)


def test_what_happened_while_no_step_ran_says_nothing(machine: Machine) -> None:
    control = ThreadControl(2, governed=True)
    for _ in range(20):
        machine.step(control)
        machine.others += 60.0
        machine.now += 60.0
    assert machine.step(control) == 2


@pytest.mark.parametrize(("threads", "governed"), [(2, False), (1, True)])
def test_a_number_that_was_set_stays(machine: Machine, threads: int, governed: bool) -> None:
    control = ThreadControl(threads, governed=governed)
    assert {machine.step(control, busy=1.0) for _ in range(100)} == {threads}


def test_own_time_and_that_of_low_priority_are_not_the_use_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  9999 9999 9999 0 0 0 0 0 0 0\n"
        "cpu0 100 700 50 9000 800 1 2 3 0 0\n"
        "cpu1 200 0 0 9000 0 0 0 0 0 0\n"
        "cpu2 9999 0 0 0 0 0 0 0 0 0\n"
        "intr 1 2 3\n"
    )
    monkeypatch.setattr(thread_control, "_STAT", stat)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("os.getpriority", lambda *_: 0)
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    monkeypatch.setattr("time.process_time", lambda: 1.5)
    use = CoreUse()
    assert use.cores == 2
    assert use.others_s() == pytest.approx(3.56 - 1.5)
    monkeypatch.setattr("os.getpriority", lambda *_: 5)
    assert CoreUse().others_s() == pytest.approx(3.56 + 7.0 - 1.5)
