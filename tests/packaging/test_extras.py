"""The dependencies that pyproject.toml declares are those the packages import."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.wheel import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PORTIONS = ("server", "prefix_store", "clients")

OPTIONAL = {
    "prefixd.client.convert.checkpoints": "convert",
    "prefixd.client.convert.formats": "convert",
    "prefixd.client.convert.tables": "convert",
    "prefixd.client.convert.tensors": "convert",
    "prefixd.store.blobs.bucket": "s3",
    "prefixd.store.blobs.s3": "s3",
    "prefixd.store.db.postgres": "postgres",
    "prefixd.server.serve.telemetry": "otel",
    "prefixd.server.cli.bench.plot": "bench",
    "prefixd.server.model.demo": "demo",
}
"""Modules that may import the packages of one optional extra."""

NOT_IMPORTED = {
    "gguf": "transformers reads the demo model's file with it",
    "torchao": "transformers reads and writes quantized checkpoints with it",
}
"""Declared packages that no module imports, and what uses them."""

BROUGHT = {"pydantic-core": "pydantic", "triton": "torch"}
"""Imported packages that another, declared one pins exactly."""


def declared(*extras: str) -> set[str]:
    """The names of the dependencies of the core and of some extras."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the three packages: its dotted name and its file."""
    for portion in PORTIONS:
        for path in sorted((ROOT / portion).glob("prefixd/**/*.py")):
            parts = path.relative_to(ROOT / portion).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(nodes: list[ast.stmt], *, at_import: bool) -> Iterator[str]:
    """The dotted names that some statements import, in functions too unless ``at_import``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            if not at_import:
                yield from imports(node.body, at_import=False)
        else:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                yield from imports(getattr(node, field, []), at_import=at_import)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@cache
def distributions() -> dict[str, list[str]]:
    return {name: list(found) for name, found in packages_distributions().items()}


def third_party(names: Iterator[str]) -> set[str]:
    """The distributions, other than ours, that provide some imported modules.

    A namespace such as ``opentelemetry`` has many providers: those declared count.
    """
    everything = declared(*OPTIONAL.values(), "serve", "postgres")
    used = set()
    for name in names:
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "prefixd":
            # A package that is not installed is named as its module.
            providers = set(map(canonicalize_name, distributions().get(top, [top])))
            used |= providers & everything or providers
    return {BROUGHT.get(name, name) for name in used}


def imported_with(*names: str) -> set[str]:
    """Modules of ours that are loaded when ``names`` are imported."""
    files = dict(modules())
    pending, loaded = list(names), set()
    while pending:
        name = pending.pop()
        if name in loaded or name not in files:
            continue
        loaded.add(name)
        pending.append(name.rpartition(".")[0])
        pending.extend(imports(tree(files[name]).body, at_import=True))
    return loaded


@pytest.mark.parametrize(
    "entry", ["prefixd.client", "prefixd.server.cli.main", "prefixd.server.__main__"]
)
def test_client_and_command_line_load_declared_core_dependencies_only(entry: str) -> None:
    files = dict(modules())
    core = declared()
    for module in sorted(imported_with(entry)):
        used = third_party(imports(tree(files[module]).body, at_import=True))
        assert used <= core, f"{module}, loaded with {entry}, needs more than the core"


def test_client_declares_all_it_imports() -> None:
    for module, path in modules():
        if module.startswith("prefixd.client"):
            allowed = declared(*filter(None, [OPTIONAL.get(module)]))
            assert third_party(imports(tree(path).body, at_import=False)) <= allowed, module


def test_server_and_store_declare_all_they_import() -> None:
    for module, path in modules():
        allowed = declared("serve", *filter(None, [OPTIONAL.get(module)]))
        assert third_party(imports(tree(path).body, at_import=False)) <= allowed, module


@pytest.mark.parametrize("entry", ["prefixd.server.serve.app", "prefixd.server.serve.build"])
def test_serving_loads_no_optional_extra(entry: str) -> None:
    files = dict(modules())
    required = declared("serve")
    for module in sorted(imported_with(entry)):
        used = third_party(imports(tree(files[module]).body, at_import=True))
        assert used <= required, f"{module}, loaded with {entry}, needs more than prefixd[serve]"


def test_every_declared_dependency_is_used() -> None:
    used = set()
    for _, path in modules():
        used |= third_party(imports(tree(path).body, at_import=False))
    everything = declared("serve", "convert", "bench", "demo", "postgres", "s3", "otel", "torchao")
    assert everything - used == set(NOT_IMPORTED)
