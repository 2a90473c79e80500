"""Compile the native library into the wheel of ``prefixd-cpu``.

In a checkout the sources are those of the core; the source distribution has a copy in ``core/``.
"""

import importlib.util
import platform
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COPY = "core"
LIBRARY = "libprefixd_cpu.so"


class LibraryBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the library and its description to a wheel, the sources to a source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the files are collected."""
        core = find_core(Path(self.root))
        if self.target_name == "sdist":
            build_data["force_include"] |= {
                str(core / name): f"{COPY}/{name}" for name in ("src", "build.py")
            }
            return
        build = load(core / "build.py")
        require_linux()
        self.folder = tempfile.TemporaryDirectory(prefix="prefixd-cpu-")
        library = Path(self.folder.name, LIBRARY)
        compiler = build.find_compiler()
        build.write_description(library, build.build_library(library, compiler=compiler))
        for path in (library, build.description_of(library)):
            build_data["force_include"][str(path)] = f"prefixd/cpu/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{compiler.machine}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove the library: it is in the wheel."""
        if self.target_name == "wheel":
            self.folder.cleanup()


def find_core(root: Path) -> Path:
    """The folder with ``build.py`` and ``src``."""
    copy = root / COPY
    return copy if copy.is_dir() else root.parent / "server/prefixd/server/model/cpu"


def load(path: Path) -> ModuleType:
    """A module by its path, without the package that it is in."""
    spec = importlib.util.spec_from_file_location("prefixd_cpu_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"expected a Python module, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def require_linux() -> None:
    """Raise RuntimeError where a server would not load the library."""
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        raise RuntimeError(f"prefixd-cpu: expected Linux with glibc, got {platform.platform()}")
