"""Runs ``prefixd`` in this process."""

import json
from typing import Any

from typer.testing import CliRunner, Result

from prefixd.server.cli.main import app


def run(*arguments: str, code: int = 0, input: str | bytes | None = None) -> Result:  # noqa: A002
    """Run a verb; its exit status must be ``code``."""
    result = CliRunner().invoke(app, list(arguments), input=input)
    assert result.exit_code == code, result.output
    return result


def run_json(*arguments: str) -> Any:
    """Run a verb with ``--json`` and parse what it prints."""
    return json.loads(run(*arguments, "--json").stdout)
