#!/usr/bin/env python3
"""Change the code in one place at a time and count the changes that no test notices, by mutmut.

    .ci/mutate.py                                   the modules in MODULES below
    .ci/mutate.py engine/block_pool.py store/gc.py  some modules of the engine or the store

Works on a copy in .mutants/ROOM, because mutmut expects the packages below src/ and writes changed
files. Prints a table and the names of the survivors: `mutmut show NAME`, run there, shows one.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIES = ROOT / ".mutants"
MODULES = ("engine/block_pool.py", "store/names.py")
TESTS = {"engine": ("tests/engine", "tests/machines"), "store": ("tests/store",)}
FOLDERS = {"engine": "src/prefixd/server/engine", "store": "src/prefixd/store"}
# Left out: tests that need a service, another process or the whole repository, and the slowest of
# the store, because a change that survives runs every test that reaches it.
EXCLUDED = ("postgres", "s3", "kill", "page", "processes", "store_machine", "store_properties")
# What mutmut notes for a mutant: the exit status of its tests.
KILLED, SURVIVED, UNTESTED = 1, 0, 33


def prepare(room: str, modules: list[str]) -> None:
    """Copy packages and tests to where mutmut looks, and name the modules of one room."""
    copy = COPIES / room
    shutil.rmtree(copy, ignore_errors=True)
    for portion in ("server", "prefix_store", "clients"):
        shutil.copytree(ROOT / portion, copy / "src", dirs_exist_ok=True, ignore=_caches)
    for folder in ("tests", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=_caches)
    excluded = " and ".join(f"not {name}" for name in EXCLUDED)
    options = {
        "source_paths": ["src"],
        "also_copy": ["docs"],
        "only_mutate": [f"{FOLDERS[room]}/{module}" for module in modules],
        "pytest_add_cli_args": ["-m", "not slow and not demo_model", "-k", excluded],
        "pytest_add_cli_args_test_selection": list(TESTS[room]),
    }
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (copy / "pyproject.toml").write_text(f"{project}\n[tool.mutmut]\n{lines}", "utf-8")


_caches = shutil.ignore_patterns("__pycache__")


def mutate(room: str, modules: list[str]) -> list[str]:
    """Run mutmut over modules of one room; print a row for each and return the survivors."""
    prepare(room, modules)
    copy = COPIES / room
    command = [sys.executable, "-m", "mutmut", "run"]
    with (copy / "log").open("w") as log:
        status = subprocess.run(command, cwd=copy, check=False, stdout=log, stderr=log).returncode  # noqa: S603
    survivors = []
    for module in modules:
        meta = copy / "mutants" / FOLDERS[room] / f"{module}.meta"
        if status or not meta.is_file():
            raise SystemExit(f"mutmut ended with status {status}: see {copy / 'log'}")
        outcomes = json.loads(meta.read_text("utf-8"))["exit_code_by_key"]
        count = Counter(outcomes.values())
        killed, survived, untested = count[KILLED], count[SURVIVED], count[UNTESTED]
        other = len(outcomes) - killed - survived - untested
        print(
            f"| {room}/{module} | {len(outcomes)} | {killed} | {survived} | {untested} | {other} |"
        )
        survivors += [name for name, outcome in outcomes.items() if outcome == SURVIVED]
    return survivors


def main() -> None:
    """Mutate the modules named, room by room."""
    names = sys.argv[1:] or MODULES
    rooms: dict[str, list[str]] = {}
    for name in names:
        room, _, module = name.partition("/")
        if room not in TESTS:
            raise SystemExit(f"{name}: expected engine/… or store/…")
        rooms.setdefault(room, []).append(module)
    print("| Module | Mutants | Killed | Survived | No test | Timed out or failed otherwise |")
    print("|---|---|---|---|---|---|", flush=True)
    survivors = [name for room, modules in rooms.items() for name in mutate(room, modules)]
    print("\n".join(["", "Survivors:", *survivors]) if survivors else "")


if __name__ == "__main__":
    main()
