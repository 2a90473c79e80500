"""Sources that compile in moments and have every function of the interface; compilers that count,
refuse or never end."""

import shutil
from pathlib import Path

from prefixd.server.model.cpu import interface
from prefixd.server.model.cpu.build import SOURCES

AVAILABLE = """
extern "C" EXPORT unsigned pfx_available() {
    unsigned bits = 0;
#ifdef PFX_HAS_PORTABLE
    bits |= 1;
#endif
#ifdef PFX_HAS_AVX2
    bits |= 2;
#endif
#ifdef PFX_HAS_AMX
    bits |= 16;
#endif
    return bits;
}
"""


def make_sources(
    folder: Path, *, sets: tuple[str, ...] = ("portable",), abi: int = interface.ABI
) -> Path:
    """A folder of sources whose functions return 0; kernel sets are empty files."""
    folder.mkdir()
    shutil.copy(SOURCES / "prefixd_cpu.h", folder)
    lines = ['#define EXPORT __attribute__((visibility("default")))', AVAILABLE]
    for name in set(interface.FUNCTIONS) - {"pfx_available"}:
        value = abi if name == "pfx_abi" else 0
        lines.append(f'extern "C" EXPORT long {name}() {{ return {value}; }}')
    (folder / "functions.cpp").write_text("\n".join(lines) + "\n")
    for name in sets:
        (folder / f"isa_{name}.cpp").write_text(f"namespace {name} {{ int compiled = 1; }}\n")
    return folder


def make_compiler(folder: Path, script: str, *, name: str = "g++") -> Path:
    """A program that runs a line of shell and then, unless that ends it, the real compiler."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\n{script}\nexec {shutil.which("g++")} "$@"\n')
    path.chmod(0o755)
    return path
