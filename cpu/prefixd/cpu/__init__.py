"""The native CPU library of prefixd, compiled. ``prefixd.server.model.cpu.library`` loads it."""

from pathlib import Path

LIBRARY = Path(__file__).with_name("libprefixd_cpu.so")
"""The library. The JSON file next to it says what it was built from."""
