"""``prefixd prefix recipe``, ``tokenize`` and ``detokenize`` against the real application."""

import json
from pathlib import Path

import pytest

from prefixd.client.errors import InvalidPrefixError, PreconditionFailedError
from prefixd.client.types import Example
from tests.cli.served_shell import Shell, served, shell

__all__ = ["served", "shell"]


def test_a_recipe_is_shown_patched_and_replaced(shell: Shell, tmp_path: Path) -> None:
    shell("prefix", "push", "mood", "--text", "Decide.")
    assert json.loads(shell("prefix", "recipe", "mood").stdout) == {}
    patch = {"prompt_template": "Q: {prompt} A:", "temperature": 0.5, "stop": ["\n"]}
    changed = shell("prefix", "recipe", "mood", "--patch", json.dumps(patch))
    assert changed.stdout == "mood@1  recipe revision 2\n"
    assert json.loads(shell("prefix", "recipe", "mood@1").stdout) == patch
    shell("prefix", "recipe", "mood", "--patch", '{"stop": null, "max_tokens": 4}')
    file = tmp_path / "recipe.json"
    file.write_text(shell("prefix", "recipe", "mood").stdout)
    assert json.loads(file.read_text()) == {
        "prompt_template": "Q: {prompt} A:",
        "temperature": 0.5,
        "max_tokens": 4,
    }
    examples = [{"prompt": "Superb.", "answer": "positive"}]
    file.write_text(json.dumps({"top_p": 0.9, "examples": examples}))
    manifest = shell.json("prefix", "recipe", "mood", "--file", file)
    assert manifest["recipe_revision"] == 4
    shown = shell.client.show_prefix("mood").recipe
    assert shown.stated == {"top_p": 0.9, "examples": examples}
    assert shown.examples == (Example(prompt="Superb.", answer="positive"),)


def test_a_wrong_recipe_is_refused_and_the_old_one_stays(shell: Shell, tmp_path: Path) -> None:
    shell("prefix", "push", "tone", "--text", "Be kind.")
    wrong = shell("prefix", "recipe", "tone", "--patch", '{"temperature": 9}', code=1)
    assert "recipe.temperature" in wrong.stderr
    for option, value in (("--patch", "[]"), ("--patch", "{"), ("--file", tmp_path / "list.json")):
        (tmp_path / "list.json").write_text("[1]")
        refused = shell("prefix", "recipe", "tone", option, value, code=2)
        assert "JSON" in refused.stderr
        assert str(option) in refused.stderr
    assert (
        "either" in shell("prefix", "recipe", "tone", "--file", "a", "--patch", "{}", code=2).stderr
    )
    assert "No such file" in shell("prefix", "recipe", "tone", "--file", "none", code=1).stderr
    assert shell("prefix", "recipe", "tone").stdout.split() == ["{}"]


def test_a_recipe_is_changed_under_a_condition(shell: Shell) -> None:
    shell.client.upload_text("guard", "Be kind.")
    etag = shell.client.show_prefix("guard").etag
    assert shell.client.patch_recipe("guard", {"top_p": 0.5}, if_match=etag).recipe_revision == 2
    with pytest.raises(PreconditionFailedError):
        shell.client.set_recipe("guard", {}, version=1, if_match=etag)
    with pytest.raises(InvalidPrefixError, match=r"recipe\.other|the fields"):
        shell.client.set_recipe("guard", {"other": 1})
    assert shell.client.show_prefix("guard").recipe.stated == {"top_p": 0.5}


def test_tokens_of_a_text_and_the_text_of_tokens(shell: Shell) -> None:
    ids = shell("tokenize", "Grüß").stdout.split()
    assert ids == [str(byte) for byte in "Grüß".encode()]
    assert shell("detokenize", *ids).stdout == "Grüß\n"
    assert shell("detokenize", "27").stdout == "\\u001b\n"
    lines = shell("tokenize", "Hi", "--show", "--no-special").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ID", "72", "105"]
    shell("prefix", "push", "polite", "--text", "Be polite.")
    tokens = shell.json("tokenize", "Hi", "--model", "polite")
    assert (tokens["tokens"], tokens["num_virtual_tokens"]) == ([72, 105], len("Be polite."))
    chat = shell("tokenize", "Hi", "--chat").stdout.split()
    assert len(chat) > 2
    assert "polite2" in shell("tokenize", "Hi", "-m", "polite2", code=1).stderr
