"""The native library's own tests, as C++ programs: all kernel sets, under sanitizers, on arm64.

``PREFIXD_TEST_SANITIZE=full`` (``make sanitize``) runs every kernel set of this processor, more
rounds and cases, and AMX with emulated tiles where the processor has all else that its kernels
need; otherwise the portable set and the fastest.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from prefixd.server.model.cpu.build import KERNEL_SETS, SOURCES, build_programs, find_compiler
from tests.model.cpu.native_library import native_library
from tests.real_services import install

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]

MAIN = Path(__file__).with_name("decoder_tests.cpp")
ATTENTION = Path(__file__).with_name("kernel_tests.cpp")
INT8 = Path(__file__).with_name("int8_tests.cpp")
POOL = Path(__file__).with_name("pool_tests.cpp")
ALL_MAINS = (MAIN, ATTENTION, INT8, POOL)
FULL = os.environ.get("PREFIXD_TEST_SANITIZE") == "full"
ROUNDS = 5 if FULL else 1
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64-static"
SANITIZERS = {
    "ASAN_OPTIONS": "abort_on_error=0:detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

Results = dict[str, list[float]]


def kernel_sets() -> tuple[str, ...]:
    """Those that run here: all, or the portable one and the fastest."""
    library = native_library()
    if not FULL:
        return tuple(dict.fromkeys((library.kernels[0], library.kernels[-1])))
    emulated = "avx512_bf16" in library.kernels and "amx" in library.built.kernels
    return tuple(dict.fromkeys((*library.kernels, *(["amx"] if emulated else []))))


def build(
    folder: Path, *flags: str, sets: Sequence[str], mains: Sequence[Path] = ALL_MAINS
) -> Path:
    """The program of MAIN; the others are next to it."""
    emulation = ("-DPFX_EMULATED_TILES",) if FULL else ()
    flags = ("-O1" if FULL else "-O0", "-g", "-Werror", *emulation, *flags)
    build_programs(folder, mains, compiler=find_compiler(), sets=sets, flags=flags)
    return folder / MAIN.stem


def run(program: Path, kernels: str, *before: str, threads: int = 2, rounds: int = 1) -> Results:
    """The numbers of each line of the output, by the line's words before them."""
    command = [*before, str(program), kernels, str(threads), str(rounds)]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **SANITIZERS}
    )
    assert ended.returncode == 0, ended.stderr[-4000:] + ended.stdout[-500:]
    assert ended.stderr == ""
    lines = [line.split() for line in ended.stdout.splitlines()]
    return {" ".join(words[:4]): [float(word) for word in words[4:]] for words in lines}


def assert_close(results: Results, expected: Results) -> None:
    """Logits are of the order of 1: float32 differs by the order of sums, bfloat16 by a rounding of
    8 bits in each layer, int8 by inputs that either makes round otherwise."""
    assert set(results) == set(expected)
    assert any("bfloat16" in key for key in results)
    for key, values in results.items():
        scale = max(map(abs, expected[key]))
        half, int8 = "bfloat16" in key, "-int8" in key
        bound = (0.12 if half and int8 else 3e-2 if half or int8 else 3e-5) * scale
        worst = max(abs(a - b) for a, b in zip(values, expected[key], strict=True))
        assert worst <= bound, f"{key}: expected a difference of at most {bound}, got {worst}"


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program with checks of addresses and undefined behaviour."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    kernels = native_library().kernels
    # The faster sets take parts of those before them, except of avx2.
    sets = [name for name in kernels if FULL or name != "avx2" or name == kernels[-1]]
    return build(tmp_path_factory.mktemp("checked"), *flags, sets=sets)


def test_kernel_sets_agree_without_a_bad_access(checked: Path):
    sets = kernel_sets()
    expected = run(checked, sets[0], rounds=ROUNDS)
    for name in sets[1:]:
        assert_close(run(checked, name, rounds=ROUNDS), expected)


@pytest.mark.parametrize("name", KERNEL_SETS["x86_64"])
@pytest.mark.parametrize("kernels", [ATTENTION, INT8], ids=["attention", "int8"])
def test_kernels_agree_with_plain_loops_without_a_bad_access(
    checked: Path, kernels: Path, name: str
):
    if name not in kernel_sets():
        pytest.skip(f"runs {', '.join(kernel_sets())}, not {name}")
    command = [str(checked.with_name(kernels.stem)), name, *([] if FULL else ["few"])]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout + ended.stderr[-4000:]


def test_results_do_not_depend_on_the_number_of_threads(checked: Path):
    name = kernel_sets()[-1]
    assert run(checked, name, threads=1) == run(checked, name, threads=3)


def test_threads_do_not_race(tmp_path: Path):
    name = kernel_sets()[0]
    program = build(tmp_path, "-fsanitize=thread", sets=(name,), mains=(MAIN, POOL))
    # Without random addresses: the sanitizer needs some of them to be free.
    before = ("setarch", "-R") if shutil.which("setarch") else ()
    run(program, name, *before, threads=3, rounds=ROUNDS)
    run_pool(program, *before)


def run_pool(program: Path, *before: str) -> None:
    command = [*before, str(program.with_name(POOL.stem))]
    environment = {**os.environ, **SANITIZERS}
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_threads_that_cost_more_than_they_gain_are_not_used(checked: Path):
    run_pool(checked)


def test_portable_kernels_run_on_arm64(checked: Path, tmp_path: Path):
    for package, tool in (("g++-aarch64-linux-gnu", CROSS), ("qemu-user-static", EMULATOR)):
        install(package, program=tool, otherwise=pytest.skip)
    compiler = find_compiler({**os.environ, "CXX": CROSS})
    assert compiler.machine == "aarch64"
    flags = ("-O1", "-Werror", "-static")
    mains = [MAIN, INT8]
    program, int8 = build_programs(tmp_path, mains, compiler=compiler, flags=flags)
    assert_close(run(program, "portable", EMULATOR, threads=2), run(checked, "portable"))
    command = [EMULATOR, str(int8), "portable", "few"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stdout


@pytest.mark.parametrize("name", [name for name in KERNEL_SETS["x86_64"] if name != "portable"])
def test_kernels_define_no_symbol_outside_their_namespace(name: str, tmp_path: Path):
    """The linker keeps one copy of an inline function: that of one kernel set, for all of them, and
    another processor would meet an instruction that it lacks."""
    compiler = find_compiler()
    source = SOURCES / f"isa_{name}.cpp"
    flags = KERNEL_SETS.get(compiler.machine, {}).get(name)
    if flags is None or not source.exists():
        pytest.skip(f"no kernels {name} for {compiler.machine}")
    target = tmp_path / "kernels.o"
    command = [*compiler.command, "-std=c++17", "-O0", "-fPIC", *flags, "-c", str(source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", str(target)],
        check=True,
        capture_output=True,
        text=True,
    )
    symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
    visible = [symbol for kind, symbol in symbols if kind.isupper() or kind in "vwu"]
    assert visible
    assert [symbol for symbol in visible if f"pfx::{name}::" not in symbol] == []
