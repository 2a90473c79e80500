"""The build of the native library: compiler, flags, kernel sets, failures."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from prefixd.server.model.cpu.build import (
    KERNEL_SETS,
    BuildFailed,
    build_library,
    build_programs,
    find_compiler,
    kernel_sets,
    read_description,
    source_digest,
    write_description,
)
from prefixd.server.model.cpu.interface import ABI
from tests.model.cpu.small_sources import make_compiler, make_sources

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def test_compiler_is_the_one_that_cxx_names(tmp_path: Path):
    path = make_compiler(
        tmp_path, 'case "$*" in *--version*) echo Ours 1.0; exit;; esac', name="ours"
    )
    compiler = find_compiler({"CXX": f"{path} -Og", "PATH": os.environ["PATH"]})
    assert compiler.command == (str(path), "-Og")
    assert compiler.version == "Ours 1.0"


@pytest.mark.parametrize("names", [["g++", "c++", "clang++"], ["c++", "clang++"], ["clang++"]])
def test_compiler_is_the_first_in_path(names: list[str], tmp_path: Path):
    script = "[ $1 = --version ] && echo $0 && exit\necho x86_64-linux-gnu; exit"
    for name in names:
        make_compiler(tmp_path, script, name=name)
    assert find_compiler({"PATH": str(tmp_path)}).command == (str(tmp_path / names[0]),)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"CXX": "no-such-compiler -O2"}, "CXX names 'no-such-compiler'"),
        ({}, "no C[+][+] compiler: expected CXX, g[+][+], c[+][+] or clang[+][+]"),
        ({"CXX": "  "}, "no C[+][+] compiler"),
    ],
)
def test_missing_compiler_is_named(environment: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(BuildFailed, match=message):
        find_compiler({**environment, "PATH": str(tmp_path)})


def test_program_that_is_no_compiler_is_refused(tmp_path: Path):
    path = make_compiler(tmp_path, "echo not a compiler >&2; exit 3")
    with pytest.raises(BuildFailed, match=r"g\+\+ --version: not a compiler"):
        find_compiler({"CXX": str(path)})


def test_processor_without_kernels_is_refused(tmp_path: Path):
    path = make_compiler(tmp_path, "echo riscv64-linux-gnu; exit")
    with pytest.raises(BuildFailed, match="expected a compiler for x86_64, aarch64, got riscv64"):
        kernel_sets(find_compiler({"CXX": str(path)}))


@needs_compiler
def test_kernel_set_that_the_compiler_lacks_is_left_out_with_the_reason(tmp_path: Path):
    refuse = 'case "$*" in *-mamx-tile*) echo "g++: error: no -mamx-tile" >&2; exit 1;; esac'
    compiler = find_compiler({"CXX": str(make_compiler(tmp_path / "bin", refuse))})
    if compiler.machine != "x86_64":
        pytest.skip("only x86-64 has optional kernel sets")
    sources = make_sources(tmp_path / "src", sets=("portable", "amx"))
    built = build_library(tmp_path / "small.so", compiler=compiler, sources=sources)
    assert built.kernels == ("portable",)
    left_out = dict(built.left_out)
    assert left_out.pop("amx") == f"{compiler.version}: g++: error: no -mamx-tile"
    assert set(left_out.values()) == {"the sources have no such kernels"}


@needs_compiler
def test_each_source_gets_the_flags_of_its_kernel_set(tmp_path: Path):
    log = tmp_path / "log"
    compiler = find_compiler({"CXX": str(make_compiler(tmp_path / "bin", f'echo "$*" >> {log}'))})
    sources = make_sources(tmp_path / "src", sets=("portable", "avx2", "amx"))
    build_library(tmp_path / "small.so", compiler=compiler, sources=sources)
    compiled = [line.split() for line in log.read_text().splitlines() if " -c " in line]
    flags = {Path(words[words.index("-c") + 1]).stem: set(words) for words in compiled}
    present = {
        name for name in ("portable", "avx2", "amx") if name in KERNEL_SETS[compiler.machine]
    }
    assert set(flags) == {"functions"} | {f"isa_{name}" for name in present}
    for name in present:
        assert set(KERNEL_SETS[compiler.machine][name]) <= flags[f"isa_{name}"]
    assert not any(word.startswith("-m") for word in flags["functions"] | flags["isa_portable"])


@needs_compiler
def test_first_error_of_the_compiler_is_reported_and_nothing_is_left(tmp_path: Path):
    sources = make_sources(tmp_path / "src")
    (sources / "wrong.cpp").write_text("int x = undefined_name;\nint y = another;\n")
    with pytest.raises(BuildFailed, match=r"wrong\.cpp: .*undefined_name"):
        build_library(tmp_path / "small.so", compiler=find_compiler(), sources=sources)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@needs_compiler
def test_compiler_that_does_not_end_is_stopped(tmp_path: Path):
    pid = tmp_path / "pid"
    script = f'case "$*" in *" -c "*) echo $$ > {pid}; exec sleep 600;; esac'
    compiler = find_compiler({"CXX": str(make_compiler(tmp_path / "bin", script))})
    sources = make_sources(tmp_path / "src")
    timeout_s = 0.25
    while not (pid.exists() and pid.read_text()):  # again if it had no time to start
        timeout_s *= 2
        with pytest.raises(BuildFailed, match="the compiler did not end in time"):
            build_library(
                tmp_path / "x.so", compiler=compiler, sources=sources, timeout_s=timeout_s
            )
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@needs_compiler
def test_programs_are_linked_from_the_sources_and_a_main_each(tmp_path: Path):
    sources = make_sources(tmp_path / "src")
    mains = [tmp_path / f"{name}.cpp" for name in ("first", "second")]
    for status, main in enumerate(mains, start=7):
        call = f"pfx_abi() == {ABI} ? {status} : 1"
        main.write_text(f'extern "C" int pfx_abi(); int main() {{ return {call}; }}')
    programs = build_programs(tmp_path, mains, compiler=find_compiler(), sources=sources)
    assert programs == [tmp_path / "first", tmp_path / "second"]
    assert [subprocess.run([program], check=False).returncode for program in programs] == [7, 8]


def test_digest_depends_on_names_and_contents_alone(tmp_path: Path):
    first, second = make_sources(tmp_path / "a"), make_sources(tmp_path / "b")
    (first / "notes.txt").write_text("no source")
    digest = source_digest(first)
    assert source_digest(second) == digest
    (second / "isa_portable.cpp").rename(second / "isa_other.cpp")
    renamed = source_digest(second)
    (second / "isa_other.cpp").write_text("int changed;")
    assert len({digest, renamed, source_digest(second)}) == 3


@needs_compiler
def test_description_is_read_as_it_was_written(tmp_path: Path):
    library = tmp_path / "small.so"
    sources = make_sources(tmp_path / "src")
    built = build_library(library, compiler=find_compiler(), sources=sources)
    write_description(library, built)
    assert read_description(library) == built


@pytest.mark.parametrize("text", ["{}", "[]", '{"kernels": ["avx2"], "abi": 1}', "not json", ""])
def test_damaged_description_is_refused(text: str, tmp_path: Path):
    (tmp_path / "small.json").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_description(tmp_path / "small.so")
