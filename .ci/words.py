#!/usr/bin/env python3
"""Reject the phrases listed in docs/words.txt, each with the wording to use instead.

    .ci/words.py                            lint every tracked file
    .ci/words.py server/prefixd docs        lint the files under these paths

A phrase matches whole words, in any case. Underscores, line breaks, comment signs and quotes
count as spaces, so identifiers, test names and wrapped prose are checked too.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LIST = "docs/words.txt"
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".sh", ".mako", ".ini", ".cfg", ".example", ""}
SUFFIXES |= {".cpp", ".h", ".inc"}
SKIPPED = {LIST, "LICENSE", "constraints.txt", "examples/tasks.py"}  # the last: training data
_WORD = re.compile(r"[a-z0-9]+")
_GAP = r"""(?:[\s_#/"'`*>\\]+(?:[fr]+["'])?)"""


class Phrase(NamedTuple):
    """A rejected phrase in lower case, its words, its pattern, and the wording to use instead."""

    text: str
    words: set[str]
    pattern: re.Pattern[str]
    replacement: str


def parse(text: str) -> list[Phrase]:
    """Read lines of ``phrase | variant => replacement``; ``#`` starts a comment."""
    phrases = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        left, arrow, replacement = line.partition(" => ")
        if not arrow or not replacement.strip():
            raise SystemExit(f"{LIST}:{number}: expected 'phrase => replacement', got {line!r}")
        for variant in left.split("|"):
            phrase = " ".join(variant.lower().split())
            pattern = re.escape(phrase).replace(r"\ ", _GAP)
            pattern = rf"(?<![a-z0-9]){pattern}(?![a-z0-9])"
            words = set(_WORD.findall(phrase))
            phrases.append(Phrase(phrase, words, re.compile(pattern), replacement.strip()))
    return phrases


def lint(name: str, text: str, phrases: list[Phrase]) -> list[str]:
    """One line per match: file, line, the phrase and its replacement."""
    lowered = text.lower()
    words = set(_WORD.findall(lowered))
    matches = []
    for phrase in phrases:
        if not phrase.words <= words:  # much faster than the pattern
            continue
        for match in phrase.pattern.finditer(lowered):
            line = lowered.count("\n", 0, match.start()) + 1
            matches.append((line, f"{name}:{line}: '{phrase.text}': write {phrase.replacement}"))
    return [message for _, message in sorted(matches)]


def tracked(root: Path, paths: list[str]) -> list[str]:
    """Tracked and new text files under ``paths``, relative to ``root``."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listing = subprocess.run(  # noqa: S603 - a fixed command on paths of the caller's choice
        [*command, *paths], cwd=root, capture_output=True, check=True
    )
    names = sorted(set(listing.stdout.decode().split("\0")) - {""} - SKIPPED)
    return [name for name in names if Path(name).suffix in SUFFIXES and (root / name).is_file()]


def main(paths: list[str]) -> int:
    """Lint the files under ``paths`` (all files when empty); 1 when a phrase occurs."""
    root = Path(__file__).resolve().parent.parent
    phrases = parse((root / LIST).read_text(encoding="utf-8"))
    messages = []
    for name in tracked(root, paths):
        messages += lint(name, (root / name).read_text(encoding="utf-8"), phrases)
    print(*messages, sep="\n", end="\n" if messages else "")
    return 1 if messages else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
