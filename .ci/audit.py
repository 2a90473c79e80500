#!/usr/bin/env python3
"""Look up every pinned version of constraints.txt in the advisories of PyPI, by pip-audit.

Exit status 1: a version has a known vulnerability. 2: a version could not be looked up, which
pip-audit itself counts as clean. 0: all were looked up and none has one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def verdict(report: dict[str, Any]) -> tuple[int, list[str]]:
    """The exit status and the lines to print for a report of pip-audit in JSON."""
    vulnerable, skipped = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            skipped.append(f"{package['name']}: {package['skip_reason']}")
        for advisory in package.get("vulns", ()):
            fixed = ", ".join(advisory["fix_versions"]) or "no version"
            vulnerable.append(
                f"{package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}"
            )
    summary = (
        f"{len(report['dependencies'])} versions: {len(vulnerable)} known vulnerabilities, "
        f"{len(skipped)} not looked up"
    )
    return 1 if vulnerable else 2 if skipped else 0, [*vulnerable, *skipped, summary]


def main() -> int:
    """Run pip-audit and print what it found."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS)]
    # Every version is pinned: nothing is resolved and nothing is installed.
    command += ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    result = subprocess.run(  # noqa: S603 - our own interpreter and our own arguments
        command, check=False, capture_output=True, text=True
    )
    if not result.stdout.startswith("{"):
        print(result.stderr, file=sys.stderr)
        return 2
    status, lines = verdict(json.loads(result.stdout))
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
