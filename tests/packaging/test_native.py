"""The second distribution, ``prefixd-cpu``: wheel, source distribution, installation."""

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefixd.server.model.cpu.build import SOURCES, read_description, source_digest
from tests.model.cpu.small_sources import make_sources
from tests.packaging.wheel import ROOT, Environment, install, load_tool, make_environment

native = load_tool("native")

CORE = "server/prefixd/server/model/cpu"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.libc_ver()[0] != "glibc",
    reason="needs g++ on Linux with glibc",
)


def build(kind: str, project: Path, output: Path, **variables: str) -> Path:
    """Build a distribution of the project by the suite's hatchling: nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(output)]
    environment = {**os.environ, **variables}
    ended = subprocess.run(
        command, cwd=project, check=False, capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    (path,) = output.iterdir()
    return path


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The part of a checkout that ``prefixd-cpu`` is built from, with sources that compile fast."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "cpu", root / "cpu", ignore=shutil.ignore_patterns("dist"))
    (root / CORE).mkdir(parents=True)
    shutil.copy(SOURCES.with_name("build.py"), root / CORE)
    make_sources(root / CORE / "src")
    return root


@pytest.fixture(scope="module")
def cpu_wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout / "cpu", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def small_core(
    wheel: Path, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """An environment with the core's wheel, without its dependencies, over the fast sources."""
    environment = make_environment(tmp_path_factory.mktemp("small-core"))
    install(environment, wheel, "--no-deps", "--no-index")
    (installed,) = environment.folder.glob("lib/python*/site-packages/prefixd/server/model/cpu/src")
    shutil.rmtree(installed)
    shutil.copytree(checkout / CORE / "src", installed)
    return environment


FIND = """
import json, sys
from pathlib import Path
from prefixd.server.model.cpu import library
try:
    found = library.find_or_compile_library(Path(sys.argv[1]))
    print(json.dumps([found.origin, str(found.path), found.kernels]))
except library.LibraryUnavailable as error:
    print(json.dumps(["none", str(error), []]))
"""


def test_core_wheel_is_pure_and_carries_the_sources(wheel: Path):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    folder = "prefixd/server/model/cpu/"
    expected = {f"{folder}src/{path.name}" for path in SOURCES.iterdir()}
    assert expected | {f"{folder}build.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]
    assert not [name for name in names if name.startswith("prefixd/cpu/")]


def test_core_requires_no_native_library():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    assert not [line for group in groups for line in group if "prefixd-cpu" in line]


def test_both_distributions_have_the_same_version_and_build_with_the_same_packages():
    core, cpu = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text("utf-8"))
        for folder in ("", "cpu")
    )
    assert core["project"]["version"] == cpu["project"]["version"]
    assert core["project"]["requires-python"] == cpu["project"]["requires-python"]
    assert core["build-system"] == cpu["build-system"]


@needs_compiler
def test_wheel_is_of_the_platform_and_holds_the_library_alone(cpu_wheel: Path, tmp_path: Path):
    assert cpu_wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(cpu_wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path)
    files = ["__init__.py", "libprefixd_cpu.json", "libprefixd_cpu.so"]
    assert sorted(names) == [f"prefixd/cpu/{name}" for name in files]
    metadata = next(tmp_path.glob("*.dist-info/WHEEL")).read_text()
    assert "Root-Is-Purelib: false" in metadata


@needs_compiler
def test_source_distribution_builds_on_its_own(checkout: Path, tmp_path: Path):
    archive = build("sdist", checkout / "cpu", tmp_path / "dist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    copied = {path.name: path.read_bytes() for path in (project / "core/src").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (checkout / CORE / "src").iterdir()}
    again = build("sdist", project, tmp_path / "again")
    with tarfile.open(archive) as first, tarfile.open(again) as second:
        assert sorted(first.getnames()) == sorted(second.getnames())
    path = build("wheel", project, tmp_path / "wheel")
    with zipfile.ZipFile(path) as opened_wheel:
        built = json.loads(opened_wheel.read("prefixd/cpu/libprefixd_cpu.json"))
    assert built["sources"] == source_digest(checkout / CORE / "src")


@needs_compiler
@pytest.mark.slow
def test_server_loads_the_installed_library(
    small_core: Environment, cpu_wheel: Path, tmp_path: Path
):
    before = small_core.run("python", "-c", FIND, str(tmp_path), PATH="/nowhere")
    assert json.loads(before.stdout)[0] == "none", before.stderr
    assert "prefixd-cpu is not installed" in json.loads(before.stdout)[1]
    install(small_core, cpu_wheel, "--no-deps", "--no-index")
    result = small_core.run("python", "-c", FIND, str(tmp_path), PATH="/nowhere")
    origin, path, kernels = json.loads(result.stdout)
    assert (origin, kernels[0]) == ("prefixd-cpu", "portable")
    assert Path(path).is_relative_to(small_core.folder)
    assert not list(tmp_path.iterdir())


def test_module_holds_a_path_alone():
    text = (ROOT / "cpu/prefixd/cpu/__init__.py").read_text("utf-8")
    imports = [line for line in text.splitlines() if "import" in line]
    assert imports == ["from pathlib import Path"]


@pytest.mark.parametrize("found", ["equal", "other", "none"])
def test_library_is_installed_unless_it_has_the_same_sources(
    found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    runs: list[str] = []

    def run(module: str, *_: str) -> str:
        runs.append(module)
        return ""

    digest = {"equal": source_digest(), "other": "0" * 64, "none": None}[found]
    monkeypatch.setattr(native, "installed_digest", lambda: digest)
    monkeypatch.setattr(native, "find_compiler", lambda: SimpleNamespace(version="g++ 1"))
    monkeypatch.setattr(native, "run", run)
    native.main()
    assert runs == ([] if found == "equal" else ["hatchling", "pip"])
    expected = "" if found == "equal" else "==> Compiling the native CPU library with g++ 1\n"
    assert capsys.readouterr().out == expected


def test_digest_of_the_installed_library_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "libprefixd_cpu.so"
    monkeypatch.setitem(sys.modules, "prefixd.cpu", SimpleNamespace(LIBRARY=library))
    assert native.installed_digest() is None
    fields = {"abi": 1, "sources": "1f", "compiler": "g++", "target": "x", "kernels": []}
    fields |= {"left_out": {}, "seconds": 1, "sha256": "2e"}
    library.with_suffix(".json").write_text(json.dumps(fields))
    assert native.installed_digest() == "1f"
    monkeypatch.setitem(sys.modules, "prefixd.cpu", None)
    assert native.installed_digest() is None


def test_install_without_a_compiler_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(native, "installed_digest", lambda: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    native.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "no C++ compiler" in lines[0]
    assert lines[0].endswith("the server computes with torch alone")


def test_install_that_fails_says_why_in_one_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    script = '#!/bin/sh\ncase "$*" in *--version*|*-dumpmachine*) echo x86_64; exit;; esac\n'
    failing = checkout / "failing-compiler"
    failing.write_text(f"{script}echo 'file.cpp:1: error: broken' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(native, "installed_digest", lambda: None)
    monkeypatch.setattr(native, "ROOT", checkout)
    monkeypatch.setenv("CXX", str(failing))
    native.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("==> No native CPU library (")
    assert "error: broken" in last


def test_installed_library_is_of_these_sources():
    """As `make install` left it; a checkout with no compiler has none."""
    try:
        module = importlib.import_module("prefixd.cpu")
        built = read_description(module.LIBRARY)
    except (ModuleNotFoundError, OSError):
        pytest.skip("prefixd-cpu is not installed")
    assert built.sources == source_digest()
