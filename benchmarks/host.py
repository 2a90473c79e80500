"""What a measurement depends on besides the engine: the processor, and who else uses it.

Linux: figures come from ``/proc``.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
FLAGS = {
    "AVX2": "avx2",
    "AVX-512": "avx512f",
    "AVX512-VNNI": "avx512_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AMX": "amx_bf16",
}
BUSY_LOOP = "while True: pass"


def processor(cpuinfo: str) -> dict[str, Any]:
    """The class of the processor, from the text of ``/proc/cpuinfo``."""
    first = cpuinfo.partition("\n\n")[0].splitlines()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)
    }
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "vendor": fields.get("vendor_id", fields.get("CPU implementer", "unknown")),
        "family": fields.get("cpu family", fields.get("CPU architecture", "unknown")),
        "model": fields.get("model", fields.get("CPU part", "unknown")),
        "name": fields.get("model name", "unknown"),
        "kernels": [name for name, flag in FLAGS.items() if flag in flags],
        "cores": os.cpu_count(),
    }


@dataclass(frozen=True)
class CpuTimes:
    """Seconds of all cores since boot: at work, and taken by the hypervisor."""

    busy: float
    steal: float

    @classmethod
    def parse(cls, stat: str) -> "CpuTimes":
        """From the text of ``/proc/stat``. Idle time and time waiting for disks do not count;
        ``user`` holds that of guests already."""
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.split()[1:9])
        return cls((user + nice + system + irq + softirq) * TICK_S, steal * TICK_S)

    @classmethod
    def now(cls) -> "CpuTimes":
        """At this moment."""
        return cls.parse(Path("/proc/stat").read_text())


def session_seconds(sessions: Collection[int]) -> float:
    """CPU seconds that the processes of these sessions have used, ended children included."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) in sessions:
            total += sum(map(int, fields[11:15]))
    return total * TICK_S


@dataclass(frozen=True)
class Load:
    """What happened during a measurement: its length, the CPU seconds of the measured processes,
    and the cores that others used or the hypervisor took, on average."""

    wall: float
    cpu: float
    foreign: float
    steal: float


class LoadMeter:
    """Measures from its construction on. ``measured`` and ``ours`` are session ids: of the engine,
    and of the comparison's other processes, which are not foreign."""

    def __init__(self, *, measured: int, ours: Collection[int]) -> None:
        self._measured, self._ours = {measured}, {measured, *ours}
        self._before = self._read()

    def _read(self) -> tuple[float, CpuTimes, float, float]:
        cpu, ours = session_seconds(self._measured), session_seconds(self._ours)
        return time.perf_counter(), CpuTimes.now(), cpu, ours

    def read(self) -> Load:
        """The load since the construction."""
        began, times_before, cpu_before, ours_before = self._before
        ended, times, cpu, ours = self._read()
        wall = ended - began
        # The ticks of processes and of the machine are counted apart: a difference may be negative.
        others = max(0.0, (times.busy - times_before.busy) - (ours - ours_before))
        steal = times.steal - times_before.steal
        return Load(wall, cpu - cpu_before, foreign=others / wall, steal=steal / wall)


def wait_until_quiet(*, limit: float, ours: Collection[int], max_wait_s: float) -> None:
    """Wait until others use less than ``limit`` cores, or ``max_wait_s`` seconds have passed."""
    deadline = time.monotonic() + max_wait_s
    while time.monotonic() < deadline:
        meter = LoadMeter(measured=0, ours=ours)
        time.sleep(0.5)
        load = meter.read()
        if load.foreign + load.steal < limit:
            return


@contextmanager
def busy_core(*, wanted: bool) -> Iterator[set[int]]:
    """A process that keeps the last core busy, if ``wanted``; yields its session id, or none."""
    if not wanted:
        yield set()
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY_LOOP], start_new_session=True)
    try:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        yield {process.pid}
    finally:
        process.kill()
        process.wait()
