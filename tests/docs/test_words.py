"""The lint of words reports every listed phrase with file, line and replacement."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("words", ROOT / ".ci" / "words.py")
assert _spec
assert _spec.loader
words = importlib.util.module_from_spec(_spec)
sys.modules["words"] = words
_spec.loader.exec_module(words)

PHRASES = words.parse((ROOT / words.LIST).read_text(encoding="utf-8"))


def run_lint(folder: Path, *paths: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / ".ci" / "words.py"), *paths]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that holds only the lint and its list."""
    for name in (".ci/words.py", words.LIST):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, timeout=60)
    return tmp_path


def test_the_list_has_at_least_60_phrases_with_replacements() -> None:
    lines = (ROOT / words.LIST).read_text(encoding="utf-8").splitlines()
    assert sum(1 for line in lines if " => " in line and not line.startswith("#")) >= 60
    assert len({phrase.text for phrase in PHRASES}) == len(PHRASES)
    assert all(phrase.replacement for phrase in PHRASES)


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.text)
def test_each_phrase_is_found_in_names_messages_and_wrapped_text(phrase: Any) -> None:
    first, *rest = phrase.text.split()
    forms = [
        f"def test_it_{'_'.join((first, *rest))}_here() -> None:",
        f'raise ValueError("{phrase.text.capitalize()}")',
        f"# {first}\n    # {' '.join(rest)} here",
        f'"{first} "\n    f"{" ".join(rest)} here"',
    ]
    for form in forms:
        assert words.lint("a.py", "\n" + form, [phrase]) == [
            f"a.py:2: '{phrase.text}': write {phrase.replacement}"
        ]
    assert words.lint("a.py", f"x{phrase.text} {phrase.text}y", [phrase]) == []


def test_the_lint_fails_with_file_line_phrase_and_replacement(repository: Path) -> None:
    phrase = PHRASES[0]
    bad = repository / "server" / "bad.py"
    bad.parent.mkdir()
    bad.write_text(f'"""A module."""\n\n# Preempted {phrase.text} blocks.\n')

    run = run_lint(repository)
    assert run.returncode == 1
    assert run.stdout == f"server/bad.py:3: '{phrase.text}': write {phrase.replacement}\n"

    assert run_lint(repository, "docs").returncode == 0
    bad.write_text('"""A module."""\n\n# Preempted: no free KV blocks.\n')
    assert run_lint(repository).returncode == 0


def test_a_line_without_a_replacement_is_rejected() -> None:
    with pytest.raises(SystemExit, match=r"words.txt:2: expected 'phrase => replacement'"):
        words.parse("# a comment\nphrase =>\n")
