#!/usr/bin/env python3
"""Write the pages that are made from the code: settings, command line, rooms.

.ci/reference.py             write docs/settings.md, docs/cli.md, .env.example, the table of rooms
.ci/reference.py --check     exit 1 and name the pages that differ from the code
"""

import inspect
import shlex
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grimp
from typer.main import get_command

from prefixd.server.cli.main import app
from prefixd.server.serve.settings_reference import SETTING_GROUPS

ROOT = Path(__file__).resolve().parents[1]
MADE_BY = "<!-- Made from the code by `make docs`. Do not edit. -->"
ARCHITECTURE = "docs/architecture.md"
ROOMS_BEGIN, ROOMS_END = "<!-- rooms:begin -->", "<!-- rooms:end -->"

# From the top: a room imports only what is below it.
ROOMS = {
    "prefixd.server.cli": "the command line",
    "prefixd.server.serve": "settings, composition, HTTP socket, shutdown, telemetry",
    "prefixd.server.api": "HTTP: one slice for each resource",
    "prefixd.server.tenants": "tenants, keys, scopes, limits, bindings, audit log",
    "prefixd.server.model": "torch: loading, forward pass, sampling",
    "prefixd.server.testing": "a fake model for tests",
    "prefixd.server.engine": "scheduler, residency, KV blocks; pure except for the loop",
    "prefixd.server.errors": "the errors of the server",
    "prefixd.store": "artifacts, blobs, catalog",
    "prefixd.store.db": "the database and the migrations of all tables",
    "prefixd.client": "the sync and the async Python client; prefixes in files and folders",
}
PACKAGES = ("prefixd.server", "prefixd.store", "prefixd.client")


# -- rooms ----------------------------------------------------------------------------------------


def import_graph() -> grimp.ImportGraph:
    """The imports of running code among our packages."""
    return grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)


def rooms_table() -> str:
    """A table of the rooms: their modules and which rooms they import."""
    graph = import_graph()
    arrows: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    modules = defaultdict(set)
    for module in sorted(graph.modules):
        if not (room := room_of(module)):
            continue
        modules[room].add(within(module, room))
        for imported in graph.find_modules_directly_imported_by(module):
            target = room_of(imported)
            if target and target != room:
                arrows[room][target].add(within(imported, target))
    rows = ["| Room | Holds | Modules | Imports |", "|---|---|---|---|"]
    for room, holds in ROOMS.items():
        names = ", ".join(sorted(modules[room] - {""}))
        imports = ", ".join(
            _target(target, parts) for target, parts in sorted(arrows[room].items())
        )
        rows.append(f"| `{short(room)}` | {holds} | {names} | {imports or 'nothing of ours'} |")
    return "\n".join(rows)


def room_of(module: str) -> str | None:
    """The room a module is in; None for the package ``prefixd.server`` itself: its version."""
    if module == "prefixd.server":
        return None
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    return max(inside, key=len, default="prefixd.server.cli")


def within(module: str, room: str) -> str:
    """The name of a module or subfolder directly inside a room; empty for the room itself."""
    inside = module.startswith(f"{room}.")
    return module.removeprefix(f"{room}.").partition(".")[0] if inside else ""


def short(room: str) -> str:
    return room.removeprefix("prefixd.").removeprefix("server.")


def _target(room: str, parts: set[str]) -> str:
    """A room that is imported, with the parts of it where they are few."""
    few = len(parts) <= 5 and "" not in parts
    return f"{short(room)} ({', '.join(sorted(parts))})" if few else short(room)


# -- settings -------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting: a flag of ``prefixd serve`` and a variable."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for option in _options(get_command(app).commands["serve"]):  # type: ignore[attr-defined]
        group = getattr(option, "rich_help_panel", None) or "Settings"
        kind = f" `{option.metavar}`" if option.metavar else ""
        groups[group].append(
            f"| `{option.opts[0]}`{kind} | `{option.envvar}` | {_default(option)} "
            f"| {_cell(option.help)} |"
        )
    lines = [
        "# Settings",
        "",
        MADE_BY,
        "",
        "Every setting is a flag of `prefixd serve` and an environment variable.",
        "The flag takes precedence. Values are checked once, at start. A `PREFIXD_*` variable that",
        "nothing reads is reported once, on standard error, with the nearest known name.",
    ]
    for group, rows in groups.items():
        lines += ["", f"## {group}", "", "| Flag | Variable | Default | Meaning |"]
        lines += ["|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def env_example() -> str:
    """Every variable that sets a connection, the output or a server, with its default."""
    lines = [
        "# Variables of prefixd and their defaults; made from the code by `make docs`.",
        "# Copy this file to .env, uncomment what you change and give it a value.",
        "# Without a container: set -a; . ./.env; set +a; prefixd serve",
        "# Docker Compose passes on only PREFIXD_DTYPE, PREFIXD_KV_TOKENS, PREFIXD_LOG_LEVEL and",
        "# PREFIXD_MODEL; add others to docker-compose.yml.",
    ]
    groups: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for _, command in _verbs("prefixd", get_command(app)):
        for option in _options(command):
            if option.envvar:
                group = getattr(option, "rich_help_panel", None) or "Output"
                groups[group].setdefault(option.envvar, option)
    for group in ("Connection", "Output", *SETTING_GROUPS):
        lines += ["", f"# -- {group} {'-' * (94 - len(group))}"]
        for variable, option in sorted(groups.pop(group).items()):
            shown = option.show_default
            words = f" Default: {shown}." if isinstance(shown, str) else ""
            lines += ["", *textwrap.wrap(f"# {_help(option)}{words}", 98, subsequent_indent="# ")]
            plain = option.default in {None, False} or isinstance(shown, str)
            lines.append(f"# {variable}={'' if plain else shlex.quote(str(option.default))}")
    assert not groups, f"options in groups of no settings: {', '.join(groups)}"
    return "\n".join(lines) + "\n"


def _help(option: Any) -> str:
    return " ".join((option.help or "").split())


# -- command line ---------------------------------------------------------------------------------


def cli_page() -> str:
    """Every verb with its arguments and options."""
    lines = ["# Command line", "", MADE_BY, ""]
    lines += ["The column Variable names the environment variable of an option that has one.", ""]
    lines += ["`prefixd VERB --help` prints the same on the terminal."]
    for path, command in _verbs("prefixd", get_command(app)):
        lines += ["", f"## {path}", "", inspect.cleandoc(command.help or "")]
        if path == "prefixd serve":
            lines += ["", "Its options are the [settings](settings.md)."]
            continue
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([path, *(_argument(p) for p in arguments)])
        rows = [_argument_row(p) for p in arguments]
        rows += [_option_row(p) for p in _options(command)]
        lines += ["", f"`{usage}`"]
        if rows:
            lines += ["", "| Option | Variable | Default | Meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _verbs(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words that name it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    if own := [option for option in _options(command) if option.name != "help"]:
        assert own
        yield path, command
    for name, inner in sorted(command.commands.items()):
        yield from _verbs(f"{path} {name}", inner)


def _options(command: Any) -> list[Any]:
    return [
        parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        and not getattr(parameter, "hidden", False)
        and parameter.name != "help"
    ]


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _argument_row(parameter: Any) -> str:
    return f"| `{_argument(parameter)}` | | {_default(parameter)} | {_cell(parameter.help)} |"


def _option_row(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    variable = f"`{parameter.envvar}`" if parameter.envvar else ""
    return f"| {names} | {variable} | {_default(parameter)} | {_cell(parameter.help)} |"


def _default(parameter: Any) -> str:
    if isinstance(shown := getattr(parameter, "show_default", None), str):
        return shown  # what a setting without a fixed default does, in words
    if parameter.required:
        return "required"
    if parameter.default in {None, False} or getattr(parameter, "is_flag", False):
        return ""
    return f"`{parameter.default}`" if shown else ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


# -- pages ----------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """The pages as the code has them, by their path."""
    text = (ROOT / ARCHITECTURE).read_text("utf-8")
    before, begin, rest = text.partition(ROOMS_BEGIN)
    _, end, after = rest.partition(ROOMS_END)
    assert begin, f"{ARCHITECTURE} has no {ROOMS_BEGIN}"
    assert end, f"{ARCHITECTURE} has no {ROOMS_END}"
    return {
        "docs/settings.md": settings_page(),
        "docs/cli.md": cli_page(),
        ".env.example": env_example(),
        ARCHITECTURE: f"{before}{begin}\n{rooms_table()}\n{end}{after}",
    }


def differing() -> list[str]:
    """The pages that are not as the code has them."""
    return [
        name
        for name, text in pages().items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text("utf-8") != text
    ]


def main() -> int:
    """Write the pages, or with ``--check`` compare them."""
    if sys.argv[1:] == ["--check"]:
        names = differing()
        for name in names:
            print(f"{name} differs from the code: run make docs")
        return 1 if names else 0
    for name, text in pages().items():
        (ROOT / name).write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
