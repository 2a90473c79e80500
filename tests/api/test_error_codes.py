"""docs/api.md lists every code of an error that the server has, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "prefixd" / "server"
MAPS = {"_CODES", "_REPORTED"}
"""Tables whose values are codes, or end with one."""


def codes_in(tree: ast.AST) -> Iterator[str]:
    constants = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "code":
                    yield from texts(keyword.value, constants)
        elif isinstance(node, ast.FunctionDef):
            defaults = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            for argument, default in defaults:
                if argument.arg == "code" and default is not None:
                    yield from texts(default, constants)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if "default_code" in names:
                yield from texts(node.value, constants)
            elif names & MAPS and isinstance(node.value, ast.Dict):
                for value in node.value.values:
                    last = value.elts[-1] if isinstance(value, ast.Tuple) else value
                    yield from texts(last, constants)


def texts(node: ast.AST, constants: dict[str, ast.expr]) -> Iterator[str]:
    """Texts that a value may be: itself, either of a conditional's, or that of a constant."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from texts(node.body, constants)
            yield from texts(node.orelse, constants)
        case ast.Name(id=name) if isinstance(constants.get(name), ast.Constant):
            yield from texts(constants[name], {})


def codes_in_source() -> set[str]:
    files = [SERVER / "errors.py"]
    for room in ("api", "tenants", "serve"):
        files += sorted((SERVER / room).rglob("*.py"))
    codes = {code for path in files for code in codes_in(ast.parse(path.read_text()))}
    for name in ("prefix_source", "constraint"):  # codes of requests that fail in the engine
        for node in ast.parse((SERVER / "engine" / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Assign):
                codes |= set(texts(node.value, {}))
    return codes


def documented() -> set[str]:
    page = (ROOT / "docs" / "api.md").read_text()
    table = page[page.index("## Errors") : page.index("## Limits", page.index("## Errors"))]
    rows = re.findall(r"^\| \d{3} \| ([^|]*) \|", table, flags=re.MULTILINE)
    return {code for row in rows for code in re.findall(r"`(\w+)`", row)}


def of_uploads() -> set[str]:
    """The codes of refused uploads, which docs/formats.md lists."""
    page = (ROOT / "docs" / "formats.md").read_text()
    return set(re.findall(r"^\| `(\w+)` \|", page[page.index("## Refusals") :], re.MULTILINE))


def test_the_page_lists_exactly_the_codes_of_the_server() -> None:
    source = codes_in_source()
    assert source - documented() - of_uploads() == set(), "not in the documentation"
    assert documented() - source - of_uploads() == set(), "of no error"
