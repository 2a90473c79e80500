"""One wheel in a run, one environment with the core alone, one with everything."""

from pathlib import Path

import pytest

from tests.packaging.wheel import (
    ROOT,
    Environment,
    add_packages_of_suite,
    build_wheel,
    install,
    make_environment,
)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment with the wheel and the dependencies it declares, from the registry."""
    environment = make_environment(tmp_path_factory.mktemp("core"))
    install(environment, wheel, "--constraint", str(ROOT / "constraints.txt"))
    return environment


@pytest.fixture(scope="session")
def complete(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel next to the packages of the suite, in place of ``prefixd[serve,demo]``."""
    environment = make_environment(tmp_path_factory.mktemp("complete"))
    install(environment, wheel, "--no-deps", "--no-index")
    add_packages_of_suite(environment)
    return environment
