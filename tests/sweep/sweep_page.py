"""The page of families, docs/families.md: ``python -m tests.sweep.sweep_page`` writes it.

With names of rows, those alone are examined again.
"""

import multiprocessing
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.sweep.sweep_kinds import KINDS
from tests.sweep.sweep_models import SWEEP
from tests.sweep.sweep_row import Row, examine

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_BEGIN, _END = "<!-- families:begin -->", "<!-- families:end -->"
_COLUMNS = ("Family", "On a CPU", "On a GPU", "Attention", *KINDS)
_PLAIN = "equal"


def write_page(names: Sequence[str]) -> None:
    """Examine rows in as many processes as there are cores, and replace them in the tables. Exits
    with the rows that could not be examined, if any."""
    known, failed = read_page(), []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for name, row in pool.imap_unordered(_examined, names):
            print(row, flush=True)
            if isinstance(row, Row):
                known[name] = row
            else:
                failed.append(name)
    rows = [known[name] for name in SWEEP if name in known]
    page = PAGE.read_text("utf-8")
    tables = f"{_BEGIN}\n{render(rows)}\n{_END}"
    PAGE.write_text(
        re.sub(f"{_BEGIN}.*{_END}", lambda _: tables, page, flags=re.DOTALL), encoding="utf-8"
    )
    sys.exit(f"not examined: {'; '.join(failed)}" if failed else None)


def _examined(name: str) -> tuple[str, Row | str]:
    """A row, or why it could not be examined."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return name, examine(name, Path(folder))
        except Exception:  # noqa: BLE001  # the other rows are examined all the same
            return name, f"{name}: {traceback.format_exc()}"


def render(rows: Sequence[Row]) -> str:
    """The tables of what is served and what is refused, with the notes of the first."""
    served, refused = [r for r in rows if not r.refused], [r for r in rows if r.refused]
    notes: dict[str, int] = {}
    lines = [
        _line(_COLUMNS),
        _line(["---"] * len(_COLUMNS)),
        *(
            _line([row.name, row.on_cpu, row.on_gpu, row.attention, *_short(row, notes)])
            for row in served
        ),
        "",
        *(f"{number}. {note}" for note, number in notes.items()),
        "",
        _line(("Refused", "Reason")),
        _line(["---"] * 2),
        *(_line([row.name, row.refused]) for row in refused),
    ]
    return "\n".join(lines)


def _short(row: Row, notes: dict[str, int]) -> Iterator[str]:
    """The cells of the kinds; what is longer than a word is a note."""
    for kind in KINDS:
        word, _, note = row.cells[kind].partition(": ")
        yield f"{word} ({notes.setdefault(note, len(notes) + 1)})" if note else word


def read_page() -> dict[str, Row]:
    """The rows of the page."""
    text = PAGE.read_text("utf-8").partition(_BEGIN)[2].partition(_END)[0]
    notes = {
        f" ({number})": f": {note}"
        for number, note in re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE)
    }
    rows: dict[str, Row] = {}
    for line in text.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 2:
            rows[cells[0]] = Row(cells[0], refused=cells[1])
        elif cells:
            name, on_cpu, on_gpu, attention, *kinds = cells
            full = [re.sub(r" \(\d+\)$", lambda m: notes[m.group()], kind) for kind in kinds]
            rows[name] = Row(
                name,
                on_cpu=on_cpu,
                on_gpu=on_gpu,
                attention=attention,
                cells=dict(zip(KINDS, full, strict=True)),
            )
    headings = {_COLUMNS[0], "Refused", "---"}
    return {name: row for name, row in rows.items() if name not in headings}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    write_page(sys.argv[1:] or SWEEP)
