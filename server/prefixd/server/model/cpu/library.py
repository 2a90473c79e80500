"""Find the native library, or compile it: installed with ``prefixd-cpu``, else in the data folder.

A library is used only if it was built from the sources next to this file.
"""

import ctypes
import hashlib
import importlib
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from prefixd.server.model.cpu import interface
from prefixd.server.model.cpu.build import (
    COMPILE_TIMEOUT_S,
    SOURCES,
    BuildFailed,
    Built,
    Compiler,
    find_compiler,
    read_description,
    source_digest,
)
from prefixd.server.model.cpu.compiled import FolderRefused, compile_into, find_compiled

FOLDER = "native"
"""The folder of compiled libraries in the data folder."""

_PACKAGE = "prefixd.cpu"


class LibraryUnavailable(Exception):
    """There is no native library; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """A loaded library of the declared interface."""

    functions: ctypes.CDLL
    """Typed as in ``interface.FUNCTIONS``."""
    path: Path
    origin: str
    """``prefixd-cpu`` or ``compiled``."""
    built: Built

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernel sets that this build and processor have, the later the faster."""
        available = self.functions.pfx_available()
        return tuple(name for i, name in enumerate(interface.KERNELS) if available >> i & 1)

    def states(self) -> dict[str, str]:
        """Each kernel set with ``available`` or the reason why it is not."""
        return {name: self._state(name) for name in interface.KERNELS}

    def error(self) -> str:
        """What the last failed call of this thread reported."""
        return (self.functions.pfx_error() or b"").decode("utf-8", "replace")

    def _state(self, name: str) -> str:
        if name in self.kernels:
            return "available"
        if name in self.built.kernels:
            return "this processor lacks it"
        return self.built.left_out.get(name, f"not for {self.built.target}")


def find_library(data_folder: Path, *, sources: Path = SOURCES) -> NativeLibrary:
    """The installed library, else one compiled earlier. Raises LibraryUnavailable."""
    _check_platform()
    try:
        return _installed(sources)
    except LibraryUnavailable as error:
        installed = str(error)
    try:
        compiler = _compiler_or_none()
        path = find_compiled(
            data_folder / FOLDER, machine=_machine(), sources=sources, compiler=compiler
        )
        if path is None:
            raise LibraryUnavailable(f"{installed}; none is compiled in {data_folder / FOLDER}")
        return _open(path, "compiled", sources)
    except (FolderRefused, OSError) as error:
        raise LibraryUnavailable(f"{installed}; {error}") from error


def find_or_compile_library(
    data_folder: Path, *, sources: Path = SOURCES, timeout_s: float = COMPILE_TIMEOUT_S
) -> NativeLibrary:
    """As find_library, and compile where there is none: once for all processes of the folder.

    Takes tens of seconds then, and at most about ``timeout_s``. Raises LibraryUnavailable.
    """
    try:
        return find_library(data_folder, sources=sources)
    except LibraryUnavailable as error:
        unavailable = str(error)
    _check_platform()
    try:
        path = compile_into(
            data_folder / FOLDER,
            compiler=_own_compiler(),
            sources=sources,
            is_usable=lambda path: _is_usable(path, sources),
            timeout_s=timeout_s,
        )
    except (BuildFailed, FolderRefused, OSError) as error:
        raise LibraryUnavailable(f"{unavailable}; {error}") from error
    return _open(path, "compiled", sources)


def _installed(sources: Path) -> NativeLibrary:
    """The library of the distribution ``prefixd-cpu``. Raises LibraryUnavailable."""
    try:
        path = importlib.import_module(_PACKAGE).LIBRARY
    except ModuleNotFoundError:
        raise LibraryUnavailable("prefixd-cpu is not installed") from None
    try:
        return _open(path, "prefixd-cpu", sources)
    except LibraryUnavailable as error:
        raise LibraryUnavailable(f"prefixd-cpu: {error}") from error


def _open(path: Path, origin: str, sources: Path) -> NativeLibrary:
    """Load a library of these sources. Raises LibraryUnavailable."""
    try:
        built = read_description(path)
        # A file cut short, as by a power failure, would end the process when it is loaded.
        intact = hashlib.sha256(path.read_bytes()).hexdigest() == built.sha256
    except (OSError, ValueError) as error:
        raise LibraryUnavailable(f"{path}: {error}") from error
    if built.sources != (expected := source_digest(sources)):
        raise LibraryUnavailable(
            f"{path} was built from sources {built.sources[:12]}, expected {expected[:12]}"
        )
    if not intact:
        raise LibraryUnavailable(f"{path} differs from what was built: its digest is another one")
    try:
        functions = ctypes.CDLL(str(path))
        interface.declare(functions)
    except (OSError, AttributeError) as error:
        raise LibraryUnavailable(str(error)) from error
    if (abi := functions.pfx_abi()) != interface.ABI:
        raise LibraryUnavailable(f"{path}: expected interface {interface.ABI}, got {abi}")
    return NativeLibrary(functions, path, origin, built)


def compiler_or(missing: LibraryUnavailable) -> Compiler:
    """The compiler that find_or_compile_library uses where find_library raises ``missing``. Raises
    LibraryUnavailable with both reasons."""
    _check_platform()
    try:
        return _own_compiler()
    except BuildFailed as error:
        raise LibraryUnavailable(f"{missing}; {error}") from error


def processor_flags() -> frozenset[str]:
    """What Linux lists as flags of the processor; empty where it lists none, as on arm64."""
    for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
        name, _, flags = line.partition(":")
        if name.strip() == "flags":
            return frozenset(flags.split())
    return frozenset()


def _is_usable(path: Path, sources: Path) -> bool:
    try:
        _open(path, "compiled", sources)
    except LibraryUnavailable:
        return False
    return True


def _own_compiler() -> Compiler:
    """A compiler for this machine. Raises BuildFailed."""
    compiler = find_compiler()
    if compiler.machine != _machine():
        raise BuildFailed(f"expected a compiler for {_machine()}, got {compiler.target}")
    return compiler


def _compiler_or_none() -> Compiler | None:
    try:
        return _own_compiler()
    except BuildFailed:
        return None


def _check_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise LibraryUnavailable(f"expected Linux, this is {sys.platform}")
    if platform.libc_ver()[0] != "glibc":
        raise LibraryUnavailable("expected glibc, this Linux has another C library")


def _machine() -> str:
    return platform.machine()
