# ruff: noqa: INP001 - a script that the Makefile runs by its path
"""Build ``prefixd-cpu`` and install it here, unless the installed one was built from these sources.

Without a compiler, or where the build fails, one line tells it: the server works without it.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from prefixd.server.model.cpu.build import (
    BuildFailed,
    find_compiler,
    read_description,
    source_digest,
)

ROOT = Path(__file__).parents[1]
WITHOUT = "the server computes with torch alone"


def main() -> None:
    """Install the library, or say why not."""
    if installed_digest() == source_digest():
        return
    try:
        compiler = find_compiler()
    except BuildFailed as error:
        print(f"==> No native CPU library ({error}): {WITHOUT}")
        return
    print(f"==> Compiling the native CPU library with {compiler.version}")
    with tempfile.TemporaryDirectory(prefix="prefixd-cpu-") as folder:
        error = run("hatchling", "build", "-t", "wheel", "-d", folder)
        pip = (
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
        )
        wheels = map(str, Path(folder).glob("*.whl"))
        error = error or run(*pip, "--force-reinstall", *wheels)
    if error:
        print(f"==> No native CPU library ({error}): {WITHOUT}")


def installed_digest() -> str | None:
    """The digest of the sources that the installed library was built from; None without one."""
    try:
        return read_description(importlib.import_module("prefixd.cpu").LIBRARY).sources
    except (ModuleNotFoundError, OSError, ValueError):
        return None


def run(module: str, *arguments: str) -> str:
    """Run a module of this environment in the folder of ``prefixd-cpu``; the last line of its
    output where it fails, else nothing."""
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(  # noqa: S603
        command, cwd=ROOT / "cpu", check=False, capture_output=True, text=True
    )
    lines = (ended.stdout + ended.stderr).strip().splitlines() or ["no message"]
    return lines[-1].strip() if ended.returncode != 0 else ""


if __name__ == "__main__":
    main()
