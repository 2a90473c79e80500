"""The control groups around this process."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")


def cgroup_folders(controller: str) -> Iterator[tuple[bool, Path]]:
    """Whether it is of version 2, and the folder: for each group with ``controller`` around the
    process, up to the root (versions 1 and 2)."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        is_v2 = controllers == ""
        if not is_v2 and controller not in controllers.split(","):
            continue
        root = CGROUPS if is_v2 else CGROUPS / controller
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield is_v2, folder
