"""The wall clock of a server process, set while it runs, with Debian's libfaketime."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.real_services import install


@dataclass(frozen=True, slots=True)
class ServerClock:
    """The wall clock of processes started with ``environment``; their monotonic clock is real.

    ``file`` holds the offset, which they read at every call.
    """

    library: Path
    file: Path

    @classmethod
    def make(cls, file: Path) -> "ServerClock":
        """A clock without offset; installs the package where it is missing."""
        install("faketime", program="faketime", otherwise=pytest.fail)
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        assert libraries, "the package faketime brought no libfaketime.so.1"
        clock = cls(libraries[0], file)
        clock.set(0)
        return clock

    @property
    def environment(self) -> dict[str, str]:
        """For the process; NO_FAKE_STAT: times of files stay those of the disk."""
        return {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "NO_FAKE_STAT": "1",
            # Else timed waits of Python's interpreter lock return at once: 20 times the CPU time.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def set(self, offset_s: float) -> None:
        """Set the clock ``offset_s`` ahead of the real time."""
        written = self.file.with_suffix(".new")
        written.write_text(f"{offset_s:+.0f}\n")
        written.replace(self.file)
