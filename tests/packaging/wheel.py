"""The wheel of this checkout, virtual environments that hold it, and the tools in .ci/."""

import importlib.util
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

TRAP = 'raise ImportError(f"{__name__} of the working folder was imported")\n'
"""The content of modules in the working folder that nothing of ours may import."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment and a working folder whose modules have the names of our folders."""

    folder: Path
    workplace: Path

    def run(
        self, program: str, *arguments: str, timeout: float = 300, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the working folder; the status is not checked."""
        return subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=self.workplace,
            env=self.variables(**variables),
            timeout=timeout,
            check=False,
            capture_output=True,
            text=True,
        )

    def variables(self, **more: str) -> dict[str, str]:
        """Environment variables: no PYTHONPATH, a home of its own."""
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.workplace),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            **more,
        }


def build_wheel(folder: Path) -> Path:
    """Build the wheel with the suite's own hatchling: nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path) -> Environment:
    """An empty virtual environment, without pip, and its working folder."""
    venv.create(folder / "venv", symlinks=True)
    workplace = folder / "workplace"
    for package in ("clients", "prefix_store"):
        (workplace / package).mkdir(parents=True)
        (workplace / package / "__init__.py").write_text(TRAP)
    (workplace / "server.py").write_text(TRAP)
    return Environment(folder / "venv", workplace)


def install(environment: Environment, wheel: Path, *flags: str) -> None:
    """Install a wheel into an environment by the suite's pip."""
    target = str(environment.folder / "bin" / "python")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", target]
    command += ["install", "--quiet", *flags, str(wheel)]
    installed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert installed.returncode == 0, installed.stderr


def add_packages_of_suite(environment: Environment) -> None:
    """Let an environment see the suite's installed packages, after its own.

    Only the folders are added: `.pth` files in them, and with them an editable install, have no
    effect.
    """
    folders = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = environment.folder / "lib" / name / "site-packages"
    (own / "suite.pth").write_text("".join(f"{folder}\n" for folder in folders))
    assert os.pathsep not in "".join(folders)


def load_tool(name: str) -> ModuleType:
    """A script of ``.ci/`` as a module."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
