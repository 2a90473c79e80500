#!/usr/bin/env python3
"""Runs unmodified clients against a server of the demo model, and writes docs/compatibility.md.

    python -m tests.compat.clients --envs /tmp/clients [NAME ...]

Each client has an environment of its own under ``--envs``, made by pip or npm where it is missing.
The results are kept in results.json, from which the table is made. The exit status is 1 where a
call failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixd.client import Client
from prefixd.server.cli.demo.child import ServerProcess, admin
from tests.compat.report import USERS

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent.parent / "docs" / "compatibility.md"
BEGIN, END = "<!-- clients:begin -->", "<!-- clients:end -->"
TEXT_PREFIXES = {"brief": "You answer in few words.", "kind": "You are kind."}


@dataclass(frozen=True)
class ClientScript:
    """A client: its name in the table, its script, and the packages of its environment.

    ``options`` are those of the server that it needs.
    """

    title: str
    script: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def is_python(self) -> bool:
        """Whether it runs in Python, and not in node."""
        return self.script.endswith(".py")


CLIENTS = {
    "openai": ClientScript("openai (Python)", "client_openai.py", ("openai",)),
    "anthropic": ClientScript("anthropic (Python)", "client_anthropic.py", ("anthropic",)),
    "openai-js": ClientScript("openai (JavaScript)", "client_openai.mjs", ("openai",)),
    "langchain": ClientScript("langchain-openai", "client_langchain.py", ("langchain-openai",)),
    "llama-index": ClientScript(
        "llama-index-llms-openai-like",
        "client_llama_index.py",
        ("llama-index-llms-openai-like",),
    ),
    "instructor": ClientScript("instructor", "client_instructor.py", ("instructor",)),
    "pydantic-ai": ClientScript(
        "pydantic-ai", "client_pydantic_ai.py", ("pydantic-ai-slim[openai]",)
    ),
    "open-webui": ClientScript(
        "Open WebUI (calls replayed)",
        "client_open_webui.py",
        ("aiohttp",),
        ("--user-header", "X-OpenWebUI-User-Id", "--tool-call-format", "json"),
    ),
    "ai": ClientScript("Vercel ai", "client_ai.mjs", ("ai", "@ai-sdk/openai-compatible", "zod")),
}


def prepare(client: ClientScript, env: Path) -> list[str]:
    """Make the environment of a client; the command that runs in it."""
    if not client.is_python:
        if not env.exists():
            env.mkdir(parents=True)
            subprocess.run(["npm", "init", "-y"], cwd=env, check=True, capture_output=True)
            subprocess.run(["npm", "install", *client.packages], cwd=env, check=True)
        return ["node", str(HERE / client.script)]
    if not env.exists():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        pip = [str(env / "bin" / "pip"), "install", "--quiet", *client.packages]
        subprocess.run(pip, check=True)
    return [str(env / "bin" / "python"), str(HERE / client.script)]


def run(client: ClientScript, env: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """The rows that the script of a client prints."""
    command = [*prepare(client, env), *arguments]
    ran = subprocess.run(command, cwd=env, capture_output=True, text=True, check=False, timeout=600)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    rows = [json.loads(line) for line in lines]
    if not rows or (ran.returncode and all(row["ok"] for row in rows)):
        raise SystemExit(f"{client.script} failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return rows


def record(title: str, rows: list[dict[str, Any]]) -> None:
    """Keep the rows of a client in place of its earlier ones, and write the table."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept[title] = rows
    RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{begin}\n{table(kept)}\n{end}{after}")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results as Markdown."""
    lines = ["| Client | Version | Call | |", "|---|---|---|---|"]
    lines += [
        f"| {title} | {row['version']} | {row['call']} | {'green' if row['ok'] else 'red'} |"
        for title, rows in sorted(results.items())
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Run unmodified clients.")
    parser.add_argument("--envs", required=True, type=Path, help="folder of the environments")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CLIENTS)}; default: all")
    arguments = parser.parse_args()
    names = arguments.names or list(CLIENTS)
    passed = True
    for options in dict.fromkeys(CLIENTS[name].options for name in names):
        chosen = [name for name in names if CLIENTS[name].options == options]
        with tempfile.TemporaryDirectory() as scratch:
            passed &= run_all(chosen, arguments.envs.resolve(), Path(scratch), options)
    return 0 if passed else 1


def run_all(names: list[str], envs: Path, data: Path, options: tuple[str, ...]) -> bool:
    """Run clients on a server of the demo model with ``options``; whether all calls passed."""
    admin(data, "tenant", "create", "clients")
    issued = admin(data, "key", "create", "--tenant", "clients")
    assert isinstance(issued, dict)
    key = str(issued["key"])
    passed = True
    with ServerProcess(data_dir=data, port=0, options=options) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        with Client(url, api_key=key) as client:
            for name, text in TEXT_PREFIXES.items():
                client.upload_text(name, text)
            for user, prefix in USERS.items():
                client.bind_user(user, prefix)
        for name in names:
            rows = run(CLIENTS[name], envs / name, ["--url", url, "--key", key, "--model", "brief"])
            for row in rows:
                print(name, json.dumps(row), flush=True)
            record(CLIENTS[name].title, rows)
            passed &= all(row["ok"] for row in rows)
    return passed


if __name__ == "__main__":
    sys.exit(main())
