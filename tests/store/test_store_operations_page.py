"""Every command, option and variable on the page for operators exists."""

import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from prefixd.server.cli.main import app
from prefixd.server.serve.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
COMMAND = re.compile(r"prefixd ((?:[a-z]+ ?)+)((?:[^\n`#]|\\\n)*)")


def test_commands_and_options_on_the_operations_page_exist() -> None:
    found = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) + re.findall(r"`(prefixd [^`]+)`", PAGE)
    seen = set()
    for words, rest in COMMAND.findall("\n".join(found).replace("\\\n", " ")):
        command: Any = get_command(app)
        for word in words.split():
            if hasattr(command, "commands"):  # a group of commands
                assert word in command.commands, f"prefixd {words}"
                command = command.commands[word]
        options = {
            name
            for parameter in command.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", rest)) <= options, f"prefixd {words}{rest}"
        seen.add(words.split()[0])
    assert seen >= {"serve", "gc", "copy", "migrate", "key"}


def test_variables_on_the_operations_page_exist() -> None:
    known = {f"PREFIXD_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"PREFIXD_[A-Z_]+", PAGE)) <= known
