"""Links in the pages resolve, make targets and commands exist, shell and Python code parse."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from prefixd.server.cli.prefixes import prefix_app
from prefixd.server.model.grammar import subset

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"(?:^|`)make ([a-z-]+)", re.MULTILINE)
PREFIX_VERB = re.compile(r"prefixd prefix ([a-z]+)\b")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(*languages: str) -> list[tuple[str, str]]:
    return [
        (_name(page), code)
        for page in PAGES
        for language, code in BLOCK.findall(page.read_text("utf-8"))
        if language in languages
    ]


def _anchors(page: Path) -> set[str]:
    """Heading anchors as common renderers generate them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_in_pages_resolve(page: Path):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_make_targets_in_pages_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", page.read_text("utf-8"), re.DOTALL))
    assert set(MAKE.findall(code)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_prefix_commands_in_pages_exist(page: Path):
    verbs = set(get_command(prefix_app).commands)  # type: ignore[attr-defined]  # a group
    assert set(PREFIX_VERB.findall(page.read_text("utf-8"))) <= verbs


@pytest.mark.parametrize(("page", "code"), _blocks("sh", "bash", "shell"))
def test_shell_blocks_in_pages_parse(page: str, code: str):
    completed = subprocess.run(
        ["bash", "-n"], input=code, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, f"{page}: {completed.stderr}"


@pytest.mark.parametrize(("page", "code"), _blocks("python"))
def test_python_blocks_in_pages_parse(page: str, code: str):
    ast.parse(code, filename=page)


def test_the_readme_has_make_demo_and_make_test_and_ci_runs_make_test():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"^make demo\b", readme, re.MULTILINE)
    assert re.search(r"^make test\b", readme, re.MULTILINE)
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make test"]


@pytest.mark.parametrize("target", ["test", "check", "demo", "serve", "clean", "help"])
def test_make_dry_run_succeeds_for_every_target(target: str):
    completed = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr


def test_commit_hooks_are_local_and_run_existing_targets():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    for hook in hooks["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        if hook["entry"].startswith("make"):
            assert re.search(rf"^{hook['entry'].split()[-1]}:", makefile, re.MULTILINE)


def test_every_dependency_is_pinned_exactly_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [
        *project["dependencies"],
        *(line for extra in extras.values() for line in extra),
    ]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [line.split("==")[0] for line in lines if line and not line.startswith("#")]
    names = {re.split(r"[<>=\[ ;]", line)[0].lower().replace("_", "-") for line in requirements}
    assert len(pinned) == len(set(pinned))
    assert names - {project["name"]} <= set(pinned)
    assert not [line for line in lines if "+" in line and not line.startswith("#")]


def test_the_architecture_page_lists_every_decision_by_number():
    page = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed = re.findall(r"^\| (\d{4}) \| \[(.+)\]\(decisions/(.+)\) \|$", page, re.MULTILINE)
    records = []
    for path in sorted((ROOT / "docs/decisions").glob("*.md")):
        number, title = path.read_text("utf-8").splitlines()[0].removeprefix("# ").split(". ", 1)
        records.append((f"{int(number):04}", title, path.name))
    assert listed == records
    assert [number for number, *_ in records] == [f"{i + 1:04}" for i in range(len(records))]


def test_page_of_structured_output_lists_the_keywords() -> None:
    page = (ROOT / "docs" / "structured_output.md").read_text("utf-8")
    section = page.split("<!-- keywords:begin -->")[1].split("<!-- keywords:end -->")[0]
    enforced, ignored = (set(re.findall(r"`([^`]+)`", part)) for part in section.split("Ignored:"))
    assert enforced == subset.KEYWORDS
    assert ignored == subset.ANNOTATIONS | {"x-"}
