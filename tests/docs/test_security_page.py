"""docs/security.md names settings, quotas and tests that exist."""

import re
from pathlib import Path

from prefixd.server.serve.settings import Settings
from prefixd.server.tenants.quotas import QUOTAS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_named_test_and_setting_exists() -> None:
    files = set(re.findall(r"`(tests/[a-z_/]+\.py)`", PAGE))
    assert len(files) > 10
    assert not [file for file in files if not (ROOT / file).is_file()]
    settings = set(re.findall(r"PREFIXD_([A-Z_]+)", PAGE))
    assert {name.lower() for name in settings} <= set(Settings.model_fields)


def test_every_quota_is_named() -> None:
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert set(QUOTAS) - named == {"max_virtual_tokens"}  # a bound of one prefix, not of a tenant


def test_every_bound_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    assert all("`tests/" in row.split("|")[-2] for row in rows)
