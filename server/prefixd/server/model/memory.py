"""Free memory of a device, and memory that this process has freed."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch

from prefixd.server.model import cgroups


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on ``device``; 0 where the system does not report them.

    On the host this is the least of what is available without swapping and what each memory cgroup
    of the process leaves (versions 1 and 2): in a container the host's free memory says little.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = (cgroups.PROC / "meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return max(0, min([int(available.split()[1]) * 1024, *_left_in_cgroups()]))
    except (OSError, StopIteration):
        return 0


def _left_in_cgroups() -> Iterator[int]:
    """What each cgroup around the process leaves, up to the root. Page cache counts as free."""
    for is_v2, folder in cgroups.cgroup_folders("memory"):
        if is_v2:
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        yield from _left(folder, limit=limit, usage=usage, cache=cache)


def _left(folder: Path, *, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root has no limit; a container sees its own group as the root
        return
    if most != "max":
        yield int(most) - used + int(stat.get(cache, 0))


def return_free_memory() -> None:
    """Give memory that was freed in this process back to the system, with glibc.

    It keeps freed blocks that lie between others: hundreds of MB once weights are cast and packed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
