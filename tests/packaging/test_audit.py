"""`make audit` counts a version that was not looked up as an error of its own."""

import pytest

from tests.packaging.wheel import load_tool

audit = load_tool("audit")

CLEAN = {"name": "clean", "version": "1", "vulns": []}
SKIPPED = {"name": "private", "skip_reason": "not on PyPI"}
VULNERABLE = {
    "name": "old",
    "version": "1",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}],
}


@pytest.mark.parametrize(
    ("packages", "status"),
    [
        ([CLEAN], 0),
        ([CLEAN, VULNERABLE], 1),
        ([CLEAN, SKIPPED], 2),
        ([SKIPPED, VULNERABLE], 1),
    ],
    ids=["clean", "vulnerable", "skipped", "both"],
)
def test_status_tells_vulnerable_from_not_looked_up(packages: list[object], status: int) -> None:
    assert audit.verdict({"dependencies": packages})[0] == status


def test_lines_name_the_package_and_the_fix() -> None:
    _, lines = audit.verdict({"dependencies": [CLEAN, SKIPPED, VULNERABLE]})
    assert lines == [
        "old 1: PYSEC-1, fixed in 2",
        "private: not on PyPI",
        "3 versions: 1 known vulnerabilities, 1 not looked up",
    ]
