"""``prefixd`` run by a tenant's user against the real application with a fake model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prefixd.client import Client
from prefixd.server.cli.main import app
from tests.api.api_world import World, make_world
from tests.clients.loopback import serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as world, serving(world.app) as url:
        yield world, url


class Shell:
    """Runs ``prefixd`` as a tenant's user."""

    def __init__(self, served: tuple[World, str]) -> None:
        world, url = served
        self.environment = {"PREFIXD_URL": url, "PREFIXD_API_KEY": world.keys["acme"]}
        self.client = Client(url, api_key=world.keys["acme"])

    def __call__(self, *arguments: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(one) for one in arguments], env=self.environment)
        assert result.exit_code == code, result.output
        return result

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code).stdout)


@pytest.fixture
def shell(served: tuple[World, str]) -> Iterator[Shell]:
    shell = Shell(served)
    with shell.client:
        yield shell
