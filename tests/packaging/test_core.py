"""The wheel without extras: the client and the command line in an environment without torch."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from prefixd.client import Client
from tests.api.api_world import BASE, World, make_world, put_text
from tests.clients.loopback import serving
from tests.packaging.wheel import ROOT, Environment
from tests.store.store_artifacts import config_bytes, ramp, tensors

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "fastapi", "sqlalchemy", "numpy", "uvicorn")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as world, serving(world.app) as url:
        yield world, url


def test_core_installs_nothing_heavy(core: Environment) -> None:
    code = "import sys, importlib.util as u; sys.exit(str([n for n in {!r} if u.find_spec(n)]))"
    result = core.run("python", "-c", code.format(HEAVY))
    assert result.stderr.strip() == "[]"


def test_modules_come_from_the_wheel(core: Environment) -> None:
    result = core.run("python", "-c", "import prefixd.client as c; print(c.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).is_relative_to(core.folder)


@pytest.mark.parametrize("name", ["clients", "prefix_store", "server"])
def test_modules_of_the_working_folder_raise_when_imported(core: Environment, name: str) -> None:
    result = core.run("python", "-c", f"import {name}")
    assert f"{name} of the working folder was imported" in result.stderr


@pytest.mark.parametrize("names", ["Client", "AsyncClient", "Client, AsyncClient"])
def test_client_imports_next_to_folders_of_the_same_names(core: Environment, names: str) -> None:
    result = core.run("python", "-c", f"from prefixd.client import {names}")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("program", [("prefixd",), ("python", "-m", "prefixd.server")])
def test_help_lists_the_verbs(core: Environment, program: tuple[str, ...]) -> None:
    result = core.run(*program, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert {"serve", "demo", "prefix", "user", "chat"} <= set(result.stdout.split())


def test_version_is_that_of_the_project_file(core: Environment) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    result = core.run("prefixd", "--version")
    assert result.returncode == 0, result.stderr
    assert project["version"] in result.stdout.split()


def test_prefix_ls_lists_the_prefixes_of_a_server(
    core: Environment, served: tuple[World, str]
) -> None:
    world, url = served
    put_text(TestClient(world.app), "pirate", "Speak like a pirate.", world.headers())
    result = core.run(
        "prefixd", "prefix", "ls", PREFIXD_URL=url, PREFIXD_API_KEY=world.keys["acme"]
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "pirate" in result.stdout


def test_pull_push_and_diff_need_no_extra(core: Environment, served: tuple[World, str]) -> None:
    world, url = served
    with Client(url, api_key=world.keys["acme"]) as client:
        put_peft(client, "pulled")
    key = world.keys["acme"]
    for verb in (("pull", "pulled", "new"), ("push", "copy", "new"), ("diff", "pulled", "copy")):
        result = core.run("prefixd", "prefix", *verb, PREFIXD_URL=url, PREFIXD_API_KEY=key)
        assert (result.returncode, result.stderr) == (0, ""), verb
    assert result.stdout == "pulled@1 and copy@1 are equal\n"


def put_peft(client: Client, name: str) -> None:
    values = {"prompt_embeddings": ramp(4, BASE.embedding_width)}
    client.upload(name, config=config_bytes(), weights=tensors(values, "BF16"))


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        (("serve",), "serve"),
        (("demo", "--once"), "serve"),
        (("tenant", "ls"), "serve"),
        (("key", "ls"), "serve"),
        (("gc",), "serve"),
    ],
)
def test_verb_without_its_extra_names_the_extra(
    core: Environment, verb: tuple[str, ...], extra: str
) -> None:
    result = core.run("prefixd", *verb)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"pip install 'prefixd[{extra}" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
