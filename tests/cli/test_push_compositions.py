"""Stacks, blends and ensembles on the command line: push, pull, diff and rollback."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from prefixd.client.errors import FormatError
from prefixd.client.folders import CompositionContent, read_folder
from prefixd.client.wire import prefix_used
from tests.api.test_prefix_routes import CONFIG, weights
from tests.cli.served_shell import Shell, served, shell

__all__ = ["served", "shell"]

COMPOSED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "stack": (["--stack", "company@1,alice"], {"stack": ["company@1", "alice@1"]}),
    "blend": (["--blend", "alice=0.25,bob@1=0.75"], {"blend": {"alice@1": 0.25, "bob@1": 0.75}}),
    "ensemble": (
        ["--ensemble", "alice,bob, company", "--combine", "vote"],
        {"ensemble": ["alice@1", "bob@1", "company@1"], "combine": "vote"},
    ),
}


@pytest.fixture
def members(shell: Shell) -> None:
    shell.client.upload_text("company", "Be kind.")
    for fill, name in ((0.25, "alice"), (0.75, "bob")):
        shell.client.upload(name, config=json.dumps(CONFIG).encode(), weights=weights(fill=fill))


@pytest.mark.parametrize("kind", COMPOSED)
@pytest.mark.usefixtures("members")
def test_a_pulled_composition_is_the_same_version_when_pushed(
    shell: Shell, tmp_path: Path, kind: str
) -> None:
    options, written = COMPOSED[kind]
    name = f"mix-{kind}"
    pushed = shell.json("prefix", "push", name, *options, "--metadata", '{"by": "ann"}')
    assert (pushed["kind"], pushed["version"]) == (kind, 1)
    shell("prefix", "pull", name, tmp_path / "mix")
    assert json.loads((tmp_path / "mix" / "composition.json").read_text()) == written
    content = read_folder(tmp_path / "mix")
    assert content == CompositionContent(written, None, {"by": "ann"})
    again = shell.json("prefix", "push", name, tmp_path / "mix")
    assert (again["version"], again["digest"]) == (1, pushed["digest"])
    shown = shell.json("prefix", "show", name)
    assert [member["reference"] for member in shown["members"]] == list(
        next(iter(written.values()))
    )


@pytest.mark.usefixtures("members")
def test_show_lists_the_members_with_weights_and_agreement(shell: Shell) -> None:
    for kind, (options, _) in COMPOSED.items():
        shell("prefix", "push", f"of-{kind}", *options)
    assert "alice@1 (0.25), bob@1 (0.75)" in shell("prefix", "show", "of-blend").output
    assert "company@1, alice@1" in shell("prefix", "show", "of-stack").output
    assert "alice@1, bob@1, company@1" in shell("prefix", "show", "of-ensemble").output
    shell.client.complete("hello", model="of-ensemble", max_tokens=3)
    agreed = "alice@1 (agreed 1 of 1)"  # the vote of different answers goes to the first
    for _ in range(400):  # it is counted in the background
        shown = shell("prefix", "show", "of-ensemble").output
        if agreed in shown:
            break
        threading.Event().wait(0.05)
    assert agreed in shown


@pytest.mark.usefixtures("members")
def test_two_versions_of_a_composition_differ_in_their_members(shell: Shell) -> None:
    for members in ("alice,company", "company,alice"):
        shell("prefix", "push", "desk", "--stack", members)
    difference = shell.json("prefix", "diff", "desk@1", "desk@2", code=1)
    assert difference["fields"]["composition"] == {
        "left": {"stack": ["alice@1", "company@1"]},
        "right": {"stack": ["company@1", "alice@1"]},
    }
    assert difference["text"] == ""
    shell("prefix", "rollback", "desk", "1")
    assert shell.json("prefix", "show", "desk")["version"] == 1


@pytest.mark.usefixtures("members")
def test_the_client_shows_what_a_request_composed(shell: Shell) -> None:
    answer = shell.client.complete(
        "x", model="tiny", prefix={"stack": ["company", "alice"]}, max_tokens=2
    )
    assert answer.prefix is not None
    assert answer.prefix.reference == "company@1,alice@1"
    assert (answer.prefix.name, answer.prefix.kind) == (None, "stack")
    headers = {
        "x-prefixd-prefix": "company@1,alice@1",
        "x-prefixd-prefix-digest": "ff",
        "x-prefixd-prefix-chosen-by": "prefix",
    }
    used = prefix_used(headers)
    assert used is not None
    assert used.reference == "company@1,alice@1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stack", "a,,b"], "expected references between commas"),
        (["--blend", "a=0.5,b"], "expected NAME=WEIGHT between commas"),
        (["--blend", "a=0.5,a=0.5"], "each name once"),
        (["--stack", "a", "--ensemble", "a,b"], "received both"),
        (["--stack", "a", "--combine", "vote"], "expected it with --ensemble"),
        (["--stack", "a", "--text", "x"], "expected one of a SOURCE"),
        ([], "--stack, --blend or --ensemble"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(shell: Shell, options: list[str], said: str) -> None:
    assert said in shell("prefix", "push", "desk", *options, code=2).output


def test_a_folder_holds_one_of_a_text_and_a_composition(tmp_path: Path) -> None:
    (tmp_path / "composition.json").write_text('{"stack": ["a"]}')
    (tmp_path / "prefix.txt").write_text("x")
    with pytest.raises(FormatError, match=r"either prefix\.txt or composition\.json"):
        read_folder(tmp_path)
