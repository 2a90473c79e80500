"""Readings of the machine, and engines in processes of their own."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import children, engines, host
from benchmarks.children import Child, EngineFailed
from benchmarks.engines import Engine, variant

CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
flags\t\t: fpu avx2 amx_bf16
"""

ENGINE = """
import os, threading
from benchmarks.peers.wire import Clock, Result, serve

class Peer:
    def __init__(self, start):
        self.about = {"version": "1", "precision": start.dtype, "options": str(start.options)}
        threading.Thread(target=self.spin, daemon=True).start()
        print("printed by a library")

    def spin(self):
        while True:
            pass

    def run(self, requests, output):
        if output == 99:
            raise ValueError("no such length")
        clock = Clock(len(requests))
        clock.tokens()
        given = 1 if output == 98 else output
        return Result(clock.seconds, clock.first, [[each.tokens[0]] * given for each in requests])

serve(Peer)
"""


def test_the_processor_is_named_with_its_kernels():
    assert host.processor(CPUINFO) == {
        "vendor": "AuthenticAMD",
        "family": "25",
        "model": "17",
        "name": "AMD EPYC",
        "kernels": ["AVX2", "AVX-512", "AVX512-BF16"],
        "cores": os.cpu_count(),
    }


def test_waiting_and_idle_time_are_no_load():
    times = host.CpuTimes.parse("cpu  100 20 30 4000 500 6 7 80 9 0\ncpu0 1 1 1 1\n")
    assert times.busy == pytest.approx((100 + 20 + 30 + 6 + 7) * host.TICK_S)
    assert times.steal == pytest.approx(80 * host.TICK_S)


def test_foreign_load_is_what_neither_the_engine_nor_the_comparison_used(
    monkeypatch: pytest.MonkeyPatch,
):
    seconds = {1: 10.0, 2: 20.0, 3: 30.0}  # by session: engine, busy process, another program
    machine = {"busy": 100.0, "steal": 5.0, "clock": 1000.0}
    monkeypatch.setattr(host, "session_seconds", lambda ids: sum(seconds[each] for each in ids))
    monkeypatch.setattr(
        host.CpuTimes, "now", lambda: host.CpuTimes(machine["busy"], machine["steal"])
    )
    monkeypatch.setattr("time.perf_counter", lambda: machine["clock"])
    meter = host.LoadMeter(measured=1, ours={2})
    seconds.update({1: 12.0, 2: 22.0, 3: 30.5})
    machine.update(busy=104.5, steal=5.2, clock=1002.0)
    load = meter.read()
    assert (load.wall, load.cpu) == (2.0, 2.0)
    assert load.foreign == pytest.approx(0.25)
    assert load.steal == pytest.approx(0.1)


def test_a_core_is_kept_busy_until_the_end():
    with host.busy_core(wanted=True) as sessions:
        (session,) = sessions
        deadline = time.monotonic() + 60
        while host.session_seconds({session}) < 0.1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert os.sched_getaffinity(session) == {max(os.sched_getaffinity(0))}
    assert not Path(f"/proc/{session}").exists()
    with host.busy_core(wanted=False) as sessions:
        assert sessions == set()


@contextmanager
def running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    folder.joinpath("benchmarks/peers").mkdir(parents=True)
    for name in ("__init__.py", "peers/__init__.py", "peers/wire.py"):
        source = children.ROOT / "benchmarks" / name
        folder.joinpath("benchmarks", name).write_text(source.read_text())
    folder.joinpath("benchmarks/peers/scripted.py").write_text(ENGINE)
    monkeypatch.setattr(children, "ROOT", folder)
    engine = Engine("scripted", "scripted", options={"caching": True})
    start = {"model": "", "dtype": "bfloat16", "threads": 1, "prefixes": {}}
    with Child(engine, Path(sys.executable), start) as child:
        child.wait()
        yield child
    assert not Path(f"/proc/{child.session}").exists()


def test_an_engine_answers_and_is_stopped_between_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with running(tmp_path, monkeypatch) as child:
        assert child.about["options"] == "{'caching': True}"
        measured = child.run([{"tokens": [7], "prefix": None}] * 2, 3)
        assert measured.tokens == [[7, 7, 7]] * 2
        assert len(measured.first) == 2
        deadline = time.monotonic() + 60
        while _states(child) != {"T"}:
            assert time.monotonic() < deadline
        # Its thread would spin: a stopped process uses no time at all.
        before = host.session_seconds({child.session})
        time.sleep(0.1)
        assert host.session_seconds({child.session}) == before


def _states(child: Child) -> set[str]:
    """Those of all its threads."""
    tasks = Path(f"/proc/{child.session}/task").iterdir()
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}


def test_a_wrong_number_of_tokens_and_an_exception_are_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with running(tmp_path, monkeypatch) as child:
        with pytest.raises(EngineFailed, match=r"expected 1 x 98 tokens, got \[1\]"):
            child.run([{"tokens": [7], "prefix": None}], 98)
        with pytest.raises(EngineFailed, match="no such length"):
            child.run([{"tokens": [7], "prefix": None}], 99)


def test_an_interrupted_run_leaves_no_timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted:
        def readline(self) -> str:
            raise KeyboardInterrupt

    with running(tmp_path, monkeypatch) as child:
        pipe = child._process.stdout
        child._process.stdout = Interrupted()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            child.run([{"tokens": [7], "prefix": None}], 1)
        child._process.stdout = pipe
        timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
        assert all(each.finished.is_set() for each in timers)


def test_a_missing_environment_names_the_script(tmp_path: Path):
    with pytest.raises(EngineFailed, match=r"vllm: .* run benchmarks/peers/install.sh"):
        children.interpreter(engines.PEERS["vllm"], tmp_path)


def test_variables_of_the_caller_do_not_reach_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PREFIXD_KV_TOKENS", "16")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LANG", "C")
    start = {"model": "m", "dtype": "bfloat16", "threads": 2}
    environment = children.child_environment(engines.OURS, start, tmp_path)
    assert "PREFIXD_KV_TOKENS" not in environment
    assert "OMP_NUM_THREADS" not in environment
    assert environment["PREFIXD_THREADS"] == "2"
    assert environment["PREFIXD_KV_REUSE"] == "false"
    assert environment["LANG"] == "C"
    free = children.child_environment(variant("free=threads="), start, tmp_path)
    assert "PREFIXD_THREADS" not in free


def test_a_variant_has_settings_and_a_revision():
    engine = variant("before=revision=0d58078,cpu_kernels=avx2")
    assert (engine.name, engine.revision) == ("before", "0d58078")
    assert engine.variables["PREFIXD_CPU_KERNELS"] == "avx2"
    assert engine.variables["PREFIXD_KV_REUSE"] == "false"
    for wrong in ("=a=b", "x=a", ""):
        with pytest.raises(ValueError, match="expected NAME"):
            variant(wrong)


def test_an_older_commit_is_unpacked_once(tmp_path: Path):
    path = children.checkout("HEAD", tmp_path).split(os.pathsep)
    assert [Path(each).name for each in path] == ["server", "prefix_store", "clients"]
    assert Path(path[0], "prefixd/server/errors.py").is_file()
    assert children.checkout("HEAD", tmp_path).split(os.pathsep) == path
    with pytest.raises(EngineFailed, match="nosuch"):
        children.checkout("nosuch", tmp_path)
