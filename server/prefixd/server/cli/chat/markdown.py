"""Markdown that a model writes, rendered for a terminal that must come to no harm.

A model's text is untrusted: control characters are shown escaped, also those written as entities
(``&#x202e;``), a link shows where it leads, and HTML is text.
"""

from collections.abc import Iterator

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import Markdown
from rich.segment import Segment

from prefixd.server.cli.output import printable

# Without `reference`, definitions of links, nothing that comes later changes what was rendered.
_PARSER = (
    MarkdownIt("commonmark", {"html": False})
    .enable(["strikethrough", "table"])
    .disable(["image", "reference"])
)


def markdown(text: str) -> Markdown:
    """``text`` as a renderable. Line breaks stay: a model means them."""
    shown = Markdown("", hyperlinks=False)
    shown.parsed = _PARSER.parse(text)
    for token in _within(shown.parsed):
        if token.type == "softbreak":
            token.type = "hardbreak"
    return shown


def _within(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _within(token.children or [])


def complete_blocks(text: str) -> int:
    """How many characters at the beginning of ``text`` are blocks that no more text can change:
    those before the last block. An unfinished last line does not count."""
    whole_lines = text[: text.rfind("\n") + 1]
    starts = [
        token.map[0] for token in _PARSER.parse(whole_lines) if token.level == 0 and token.map
    ]
    before = whole_lines.split("\n")[: starts[-1]] if starts else []
    return sum(len(line) + 1 for line in before)


class Printable:
    """A renderable whose text holds no control characters, without empty lines around it; with
    ``height``, its last lines."""

    def __init__(self, renderable: RenderableType, height: int | None = None) -> None:
        self._renderable = renderable
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._renderable, options.update(height=None), pad=False)
        filled = [number for number, line in enumerate(lines) if any(part.text for part in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        for line in lines if self._height is None else lines[-self._height :]:
            yield from (Segment(printable(part.text), part.style) for part in line)
            yield Segment.line()
