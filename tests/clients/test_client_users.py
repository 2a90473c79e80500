"""Bindings through the client and its verbs, against the real application over a fake model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from prefixd.client import Client, errors
from prefixd.server.cli.main import app
from tests.api.api_world import World, make_world
from tests.clients.loopback import serving


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as world, serving(world.app) as url:
        yield world, url


@pytest.fixture
def client(served: tuple[World, str]) -> Iterator[Client]:
    world, url = served
    with Client(url, api_key=world.keys["acme"]) as connected:
        connected.upload_text("voice", "Be brief.")
        yield connected


def test_bind_use_and_unbind_a_user(client: Client):
    binding = client.bind_user("ann/1 é", "voice@1")
    assert (binding.user, binding.prefix) == ("ann/1 é", "voice@1")
    assert client.show_binding("ann/1 é") == binding
    completion = client.complete("hi", model="tiny", user="ann/1 é", max_tokens=2)
    assert completion.prefix is not None
    assert (completion.prefix.reference, completion.prefix.chosen_by) == ("voice@1", "user")
    with client.stream_complete("hi", model="tiny", user="ann/1 é", max_tokens=2) as stream:
        assert stream.prefix == completion.prefix
    client.unbind_user("ann/1 é")
    with pytest.raises(errors.NotFoundError):
        client.show_binding("ann/1 é")


def test_set_use_and_remove_the_default_prefix(client: Client):
    assert client.set_default("voice") == "voice"
    assert client.show_default() == "voice"
    completion = client.complete("hi", model="tiny", user="unbound", max_tokens=2)
    assert completion.prefix is not None
    assert completion.prefix.chosen_by == "default"
    client.remove_default()
    with pytest.raises(errors.NotFoundError):
        client.show_default()


def test_imported_bindings_are_listed_in_pages(client: Client):
    lines = [json.dumps({"user": f"u{n}", "prefix": "voice"}) for n in range(5)]
    assert client.import_bindings("\n".join(lines).encode()) == 5
    page = client.list_bindings(limit=3)
    rest = client.list_bindings(after=page.next_after)
    assert [binding.user for binding in (*page.bindings, *rest.bindings)] == [
        f"u{n}" for n in range(5)
    ]
    for n in range(5):
        client.unbind_user(f"u{n}")


def test_user_verbs_bind_import_list_and_unbind(
    client: Client, served: tuple[World, str], tmp_path: Path
):
    world, url = served
    environment = {"PREFIXD_URL": url, "PREFIXD_API_KEY": world.keys["acme"]}

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, ["user", *arguments], env=environment)
        assert result.exit_code == 0, result.output
        return result

    assert run("bind", "ann", "voice").stdout == "ann has voice\n"
    assert json.loads(run("ls", "--json").stdout)[0]["prefix"] == "voice"
    file = tmp_path / "users.ndjson"
    file.write_text('{"user": "bob", "prefix": "voice@1"}\n')
    assert run("import", str(file)).stdout == "1 users bound\n"
    assert [line.split()[0] for line in run("ls").stdout.splitlines()] == ["USER", "ann", "bob"]
    assert run("default", "set", "voice").stdout == run("default", "show").stdout == "voice\n"
    assert run("default", "rm").stdout == "no default prefix\n"
    assert run("unbind", "ann").stdout == "ann unbound\n"
    assert json.loads(run("ls", "--json").stdout)[0]["user"] == "bob"
    refused = CliRunner().invoke(app, ["user", "unbind", "ann"], env=environment)
    assert refused.exit_code == 1
    assert "bound to no prefix" in refused.stderr
