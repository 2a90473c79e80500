"""Build the native library: its sources, the flags of each kernel set, and the compiler.

Imports the standard library only: the build hook of ``prefixd-cpu`` loads this file by its path in
an environment without prefixd.

Each ``isa_NAME.cpp`` is compiled with the flags of kernel set NAME, all other sources with those of
the plain processor. All sources see ``PFX_HAS_NAME=1`` for each kernel set in the build.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("src")

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fvisibility-inlines-hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"),
)
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")

KERNEL_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": _AVX512_BF16,
        "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"portable": ()},
}
"""The flags of each kernel set, by the processor family in the compiler's target."""

COMPILE_TIMEOUT_S = 300.0
_PROBE_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MAX_PROCESSES = 4
_SUFFIXES = {".cpp", ".inc", ".h"}


class BuildFailed(Exception):
    """The library cannot be built; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: its command, the first line of ``--version``, and its target triple."""

    command: tuple[str, ...]
    version: str
    target: str

    @property
    def machine(self) -> str:
        """The processor family that it compiles for, as in KERNEL_SETS."""
        machine = self.target.partition("-")[0]
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@dataclass(frozen=True, slots=True)
class Built:
    """What a library was built from and what it holds."""

    abi: int
    sources: str
    """The digest of the sources and flags."""
    compiler: str
    target: str
    kernels: tuple[str, ...]
    left_out: Mapping[str, str]
    """Kernel sets that the compiler cannot build, each with the reason."""
    seconds: float
    sha256: str
    """Of the library's bytes."""


def find_compiler(environment: Mapping[str, str] = os.environ) -> Compiler:
    """The compiler in ``CXX``, else g++, c++ or clang++. Raises BuildFailed."""
    if chosen := shlex.split(environment.get("CXX", "")):
        if shutil.which(chosen[0], path=environment.get("PATH")) is None:
            raise BuildFailed(f"CXX names {chosen[0]!r}, which is no program in PATH")
        return _compiler(chosen)
    for name in ("g++", "c++", "clang++"):
        if path := shutil.which(name, path=environment.get("PATH")):
            return _compiler([path])
    raise BuildFailed("no C++ compiler: expected CXX, g++, c++ or clang++, found none of them")


def source_digest(sources: Path = SOURCES) -> str:
    """SHA-256 over the names and contents of the sources, and the flags."""
    digest = hashlib.sha256(repr((FLAGS, KERNEL_SETS)).encode())
    for path in sorted(path for path in sources.iterdir() if path.suffix in _SUFFIXES):
        content = path.read_bytes()
        digest.update(f"\0{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def abi_of(sources: Path = SOURCES) -> int:
    """The version of the interface in prefixd_cpu.h."""
    header = (sources / "prefixd_cpu.h").read_text("utf-8")
    match = re.search(r"^#define PFX_ABI (\d+)$", header, re.MULTILINE)
    if match is None:
        raise BuildFailed(
            f"{sources / 'prefixd_cpu.h'}: expected a line '#define PFX_ABI <number>'"
        )
    return int(match[1])


def kernel_sets(
    compiler: Compiler, sources: Path = SOURCES
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The kernel sets that a compiler can build, with their flags, and the reasons of the others.

    Raises BuildFailed for a processor family that has none.
    """
    if (table := KERNEL_SETS.get(compiler.machine)) is None:
        expected = ", ".join(KERNEL_SETS)
        raise BuildFailed(f"expected a compiler for {expected}, got {compiler.target}")
    usable, left_out = {}, {}
    for name, flags in table.items():
        if not (sources / f"isa_{name}.cpp").exists():
            left_out[name] = "the sources have no such kernels"
        elif (error := _refusal(compiler, flags)) is None:
            usable[name] = flags
        else:
            left_out[name] = f"{compiler.version}: {error}"
    return usable, left_out


def build_library(
    output: Path,
    *,
    compiler: Compiler,
    sources: Path = SOURCES,
    flags: Sequence[str] = (),
    timeout_s: float = COMPILE_TIMEOUT_S,
) -> Built:
    """Compile the sources in parallel and link the shared library ``output``. Raises BuildFailed.

    ``flags`` come last. Intermediate files lie in the folder of ``output`` and are removed.
    """
    usable, left_out = kernel_sets(compiler, sources)
    start = time.monotonic()
    plan = _Plan(compiler, sources, usable, tuple(flags), start + timeout_s)
    plan.build(output.parent, {output: None}, "-shared")
    return Built(
        abi=abi_of(sources),
        sources=source_digest(sources),
        compiler=compiler.version,
        target=compiler.target,
        kernels=tuple(usable),
        left_out=left_out,
        seconds=round(time.monotonic() - start, 1),
        sha256=hashlib.sha256(output.read_bytes()).hexdigest(),
    )


def build_programs(
    folder: Path,
    mains: Iterable[Path],
    *,
    compiler: Compiler,
    sources: Path = SOURCES,
    sets: Collection[str] = (),
    flags: Sequence[str] = (),
) -> list[Path]:
    """As build_library, but a program in ``folder`` from the sources and each file of ``mains``:
    for tests. With some kernel sets only, if ``sets`` names them."""
    usable, _ = kernel_sets(compiler, sources)
    usable = {name: own for name, own in usable.items() if not sets or name in sets}
    deadline = time.monotonic() + COMPILE_TIMEOUT_S
    plan = _Plan(compiler, sources, usable, tuple(flags), deadline)
    programs = {folder / path.stem: path for path in mains}
    plan.build(folder, programs)
    return list(programs)


def description_of(library: Path) -> Path:
    """The file next to a library that says what it was built from."""
    return library.with_suffix(".json")


def write_description(library: Path, built: Built) -> None:
    """Write what a library was built from next to it."""
    description_of(library).write_text(json.dumps(asdict(built), indent=1) + "\n", "utf-8")


def read_description(library: Path) -> Built:
    """What a library was built from. Raises OSError, or ValueError for another content."""
    try:
        fields = json.loads(description_of(library).read_text("utf-8"))
        return Built(**{**fields, "kernels": tuple(fields["kernels"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{description_of(library)}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Plan:
    """Compile each source on its own, then link."""

    compiler: Compiler
    sources: Path
    usable: Mapping[str, tuple[str, ...]]
    flags: tuple[str, ...]
    deadline: float

    def build(self, folder: Path, outputs: Mapping[Path, Path | None], *link: str) -> None:
        """Write the files ``outputs`` of the folder, each with a source of its own or none."""
        common = [path for path in self.sources.glob("*.cpp") if self._flags_of(path) is not None]
        own = [path for path in outputs.values() if path is not None]
        with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as name:
            objects = {path: str(Path(name, f"{path.stem}.o")) for path in [*common, *own]}
            largest_first = sorted(objects, key=lambda path: -path.stat().st_size)
            commands = {path.name: self._compile(path, objects[path]) for path in largest_first}
            _run_all(commands, Path(name), self.deadline)
            start = [*self.compiler.command, "-pthread", *self.flags, *link]
            shared = [objects[path] for path in common]
            links = {}
            for output, main in outputs.items():
                inputs = [*shared, *([objects[main]] if main else [])]
                links[output.name] = [*start, *inputs, "-o", str(Path(name, output.name))]
            _run_all(links, Path(name), self.deadline)
            for output in outputs:
                Path(name, output.name).replace(output)

    def _compile(self, path: Path, target: str) -> list[str]:
        has = [f"-DPFX_HAS_{name.upper()}=1" for name in self.usable]
        own = self._flags_of(path) or ()
        flags = [*FLAGS, f"-I{self.sources}", *has, *own, *self.flags]
        return [*self.compiler.command, *flags, "-c", str(path), "-o", target]

    def _flags_of(self, path: Path) -> tuple[str, ...] | None:
        """Those of the source's kernel set; None where that is not in the build."""
        if not path.stem.startswith("isa_"):
            return ()
        return self.usable.get(path.stem.removeprefix("isa_"))


def _compiler(command: Sequence[str]) -> Compiler:
    version, target = (_answer([*command, flag]) for flag in ("--version", "-dumpmachine"))
    return Compiler(tuple(command), version, target)


def _answer(command: Sequence[str]) -> str:
    """The first line that a compiler prints."""
    ended = _ended(command)
    if ended.returncode != 0:
        raise BuildFailed(f"{shlex.join(command)}: {_first_error(ended.stderr)}")
    return ended.stdout.partition("\n")[0].strip()


def _refusal(compiler: Compiler, flags: Sequence[str]) -> str | None:
    """Why the compiler does not take some flags; None where it does."""
    if not flags:
        return None
    ended = _ended([*compiler.command, *flags, "-x", "c++", "-fsyntax-only", "-"])
    return None if ended.returncode == 0 else _first_error(ended.stderr)


def _ended(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A short run of the compiler, with nothing as its input. Raises BuildFailed."""
    try:
        return subprocess.run(  # noqa: S603 - the compiler
            command,
            capture_output=True,
            check=False,
            text=True,
            input="",
            env=_environment(),
            timeout=_PROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildFailed(f"{shlex.join(command)}: {error}") from error


def _run_all(commands: Mapping[str, Sequence[str]], folder: Path, deadline: float) -> None:
    """Run commands, few at a time. Raises BuildFailed at the first error or after ``deadline``; no
    process is left running."""
    waiting, running = list(commands.items()), dict[str, subprocess.Popen[bytes]]()
    processes = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, command = waiting.pop(0)
                with (folder / f"{name}.log").open("wb") as log:
                    running[name] = subprocess.Popen(  # noqa: S603 - the compiler
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=_environment(),
                        start_new_session=True,
                    )
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode != 0:
                    text = (folder / f"{name}.log").read_text("utf-8", "replace")
                    raise BuildFailed(f"{name}: {_first_error(text)}")
            if time.monotonic() > deadline:
                raise BuildFailed(f"the compiler did not end in time: {', '.join(running)}")
            time.sleep(_POLL_S)
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the compiler's own children
                process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["the compiler failed without a message"])[0]
