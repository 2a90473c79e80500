"""The rooms: which imports which, the contract that enforces it, and the table in the docs."""

import re
import tomllib
from functools import cache

import grimp
import pytest

from tests.packaging.wheel import ROOT, load_tool

reference = load_tool("reference")

ALLOWED = {
    "cli": {"serve", "client"},
    "serve": {"api", "model", "tenants", "engine", "store", "store.db", "errors"},
    "api": {"tenants", "store", "engine", "errors"},
    "tenants": {"store", "store.db", "errors"},
    "model": {
        "engine.constraint",
        "engine.detokenizer",
        "engine.prefix_source",
        "engine.request",
        "engine.runner",
        "engine.step",
        "store.artifact",
    },
    "testing": {"engine"},
    "engine": set(),
    "errors": set(),
    "store": {"store.db"},
    "store.db": {"store.errors", "store.faults", "store.files"},
    "client": set(),
}
"""The arrows of docs/architecture.md: a room, or one module of it."""


@cache
def graph() -> grimp.ImportGraph:
    return reference.import_graph()


def arrows() -> set[tuple[str, str, str]]:
    """Every import of another room: the importing room, the imported room and module."""
    found = set()
    for module in graph().modules:
        room = reference.room_of(module)
        for imported in graph().find_modules_directly_imported_by(module):
            target = reference.room_of(imported)
            if room and target and target != room:
                inside = reference.within(imported, target)
                found.add((reference.short(room), reference.short(target), inside))
    return found


def test_the_table_has_every_room_once() -> None:
    assert {reference.short(room) for room in reference.ROOMS} == set(ALLOWED)
    for package in reference.PACKAGES:
        for child in graph().find_children(package):
            assert reference.room_of(child) in reference.ROOMS


@pytest.mark.parametrize("room", ALLOWED)
def test_room_imports_what_its_arrows_allow(room: str) -> None:
    used = {(target, module) for source, target, module in arrows() if source == room}
    allowed = ALLOWED[room]
    assert [
        f"{target}.{module}"
        for target, module in sorted(used)
        if target not in allowed and f"{target}.{module}" not in allowed
    ] == []


def test_the_contracts_name_every_module_of_the_rooms() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = [c for c in contracts if c["type"] == "layers" and c.get("exhaustive")]
    named = {
        f"{container}.{name.strip(' ()')}"
        for contract in layers
        for container in contract["containers"]
        for layer in contract["layers"]
        for name in re.split(r"[|:]", layer)
    }
    assert {container for contract in layers for container in contract["containers"]} >= set(
        reference.PACKAGES
    )
    children = {child for package in reference.PACKAGES for child in graph().find_children(package)}
    assert children <= named


@pytest.mark.parametrize("page", ["docs/settings.md", "docs/cli.md", "docs/architecture.md"])
def test_page_is_as_the_code_has_it(page: str) -> None:
    made = reference.pages()[page]
    assert (ROOT / page).read_text("utf-8") == made, f"{page} is out of date: run make docs"
