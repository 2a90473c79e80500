"""How many cores this process can use."""

import os
from pathlib import Path

from prefixd.server.model import cgroups

_CPUS = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Threads that compute, unless the operator says otherwise: the usable cores, or fewer where
    ``OMP_NUM_THREADS`` asks for fewer, as torch does."""
    requested = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    cores = usable_cores()
    return min(cores, max(1, int(requested))) if requested.isdigit() else cores


def usable_cores() -> int:
    """Physical cores that the affinity of the process and its cgroups allow it, at least one. Two
    hardware threads of a core share its arithmetic units: they count once."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    return max(1, min([len({_core_of(cpu) for cpu in cpus}), *_quotas()]))


def _core_of(cpu: int) -> str:
    """Which hardware threads share a core with ``cpu``; ``cpu`` itself where that is unknown."""
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas() -> list[int]:
    """Whole cores of each quota of the cgroups around the process."""
    quotas = []
    for is_v2, folder in cgroups.cgroup_folders("cpu"):
        try:
            if is_v2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:  # the root has no quota
            continue
        if quota not in {"max", "-1"}:
            quotas.append(int(quota) // int(period))
    return quotas
