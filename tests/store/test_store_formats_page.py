"""docs/formats.md lists exactly the existing error codes."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def codes_in_source() -> set[str]:
    """First arguments of every ArtifactRefused, also where a table or a conditional picks them."""
    found = {"pickle", "archive"}  # from the table of magic bytes
    for path in [*(ROOT / "prefix_store").rglob("*.py"), *(ROOT / "server").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ArtifactRefused":
                code = node.args[0]
                if isinstance(code, ast.Constant):
                    found.add(str(code.value))
    return found | {"trailing_bytes"}  # picked against truncated


def test_the_formats_page_lists_exactly_the_existing_error_codes() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    table = page[page.index("## Refusals") :]
    documented = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert documented == codes_in_source()
