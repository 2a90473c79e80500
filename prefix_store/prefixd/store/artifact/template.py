"""``prompt_template``: the text around a prompt, and where virtual tokens of a soft prompt stand.

::

    {prefix:0:4}Tweet: {prompt}{prefix:4:8} Label:

    {prompt}              the prompt of the request, inserted as it is
    {prefix:4:8}          virtual tokens 4 to 7
    {{prompt} {{prefix:   the texts {prompt} and {prefix:

All other braces are text. A template without {prompt} and without markers, but with tags or
expressions of Jinja, is a chat template. Only a template is parsed, never the text of a request.
"""

import re
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from itertools import dropwhile
from typing import NamedTuple

from prefixd.store.artifact.kinds import Kind, TextRole
from prefixd.store.artifact.strict import shown
from prefixd.store.errors import ArtifactRefused

MAX_TEMPLATE_BYTES = 16 * 1024


class TemplateKind(Enum):
    """What a template is: text around virtual tokens, text around the prompt, or Jinja."""

    PLACED = "placed"
    PLAIN = "plain"
    JINJA = "jinja"


class Rows(NamedTuple):
    """Virtual tokens ``start`` to ``stop - 1``."""

    start: int
    stop: int


class Prompt(NamedTuple):
    """The place of the request's prompt."""


PROMPT = Prompt()

Piece = str | Rows | Prompt

_SPECIAL = re.compile(
    r"\{(?=\{prompt\}|\{prefix:)(?P<escaped>\{)"
    r"|(?P<prompt>\{prompt\})"
    r"|\{prefix:(?P<start>0|[1-9][0-9]{0,8}):(?P<stop>0|[1-9][0-9]{0,8})\}"
    r"|(?P<malformed>\{prefix:[^{}]{0,40}\}?)"
)


_JINJA = re.compile(r"\{%|\{\{(?!prompt\}|prefix:)")


def parse_template(template: str) -> tuple[Piece, ...] | None:
    """The pieces of a template in order; None: it has no markers. Raises ArtifactRefused for what
    begins as a marker and is none."""
    pieces = template_pieces(template)
    return pieces if any(isinstance(piece, Rows) for piece in pieces) else None


def template_kind(template: str) -> TemplateKind | None:
    """What a template is; None: neither of them, as earlier servers stored it."""
    try:
        pieces = template_pieces(template)
    except ArtifactRefused:
        return None
    if any(isinstance(piece, Rows) for piece in pieces):
        return TemplateKind.PLACED
    if pieces.count(PROMPT) == 1:
        return TemplateKind.PLAIN
    return TemplateKind.JINJA if _JINJA.search(template) else None


@lru_cache(maxsize=1024)
def template_pieces(template: str) -> tuple[Piece, ...]:
    """The pieces of a template in order. Raises ArtifactRefused as ``parse_template``."""
    pieces: list[Piece] = []
    text, end = "", 0
    for match in _SPECIAL.finditer(template):
        text += template[end : match.start()]
        end = match.end()
        if match["escaped"]:
            text += "{"
            continue
        if match["malformed"]:
            raise _refused(
                "a marker {prefix:FROM:TO} of whole numbers (or {{prefix: for that text)",
                shown(match["malformed"]),
            )
        if text:
            pieces.append(text)
        text = ""
        pieces.append(PROMPT if match["prompt"] else Rows(int(match["start"]), int(match["stop"])))
    text += template[end:]
    if text:
        pieces.append(text)
    return tuple(pieces)


def check_template(
    template: str | None, *, kind: Kind, num_virtual_tokens: int, all_in_front: bool = False
) -> None:
    """Raise ArtifactRefused for a template whose markers do not fit the prefix, or for
    ``all_in_front``, which leave a virtual token elsewhere than in front of all text, in order.
    One without markers fits any prefix."""
    pieces = None if template is None else parse_template(template)
    if pieces is None:
        return
    if not kind.is_soft:
        raise _refused("{prefix:…} markers only for a soft prompt", kind.value)
    num_prompts = sum(isinstance(piece, Prompt) for piece in pieces)
    if num_prompts != 1:
        raise _refused("{prompt} once among {prefix:…} markers", f"{num_prompts} times")
    rows = [piece for piece in pieces if isinstance(piece, Rows)]
    problem = rows_problem(rows, num_virtual_tokens)
    if problem is not None:
        raise _refused(*problem)
    if not all_in_front:
        return
    placed = [token for start, stop in rows for token in range(start, stop)]
    last = list(range(num_virtual_tokens - len(placed), num_virtual_tokens))
    if pieces[: len(rows)] != tuple(rows) or placed != last:
        raise _refused(
            "all virtual tokens in front of the text, in order, as PEFT places them for an "
            "encoder-decoder",
            "others",
        )


def check_new_template(template: str | None) -> None:
    """Raise ArtifactRefused for a template that could not be applied to any prefix."""
    if template is None:
        return
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise _refused(f"at most {MAX_TEMPLATE_BYTES} bytes", str(size))
    pieces = template_pieces(template)
    if template_kind(template) is None:
        raise _refused(
            "{prompt} once, or to be a Jinja chat template ({% for message in messages %} …)",
            f"{{prompt}} {pieces.count(PROMPT)} times, and no Jinja",
        )


def check_role(template: str | None, role: TextRole | None) -> None:
    """Raise ArtifactRefused for a template around the text of a message, under a text that is a
    system turn."""
    if role is TextRole.SYSTEM and template and template_kind(template) is TemplateKind.PLAIN:
        raise _refused(
            "no {prompt} under a text with the role system, which stands in a chat",
            "a plain template",
        )


def num_in_front(template: str | None, *, num_virtual_tokens: int) -> int:
    """How many of a soft prompt's virtual tokens stand in front of all text: those that a template
    does not place, and those that it begins with. 0 for one that does not fit."""
    try:
        pieces = parse_template(template or "") or ()
        check_template(template, kind=Kind.SOFT_PROMPT, num_virtual_tokens=num_virtual_tokens)
    except ArtifactRefused:
        return 0  # stored before templates were checked: no request can run under it
    inside = dropwhile(lambda piece: isinstance(piece, Rows), pieces)
    rows = (piece for piece in inside if isinstance(piece, Rows))
    return num_virtual_tokens - sum(stop - start for start, stop in rows)


def rows_problem(rows: Iterable[Rows], num_virtual_tokens: int) -> tuple[str, str] | None:
    """What was expected of ranges of a prefix of so many virtual tokens, and what is wrong; None:
    nothing is."""
    taken: set[int] = set()
    for start, stop in rows:
        if not 0 <= start < stop <= num_virtual_tokens:
            expected = f"ranges FROM:TO of the virtual tokens 0 to {num_virtual_tokens - 1}"
            limits = f"FROM below TO, at most 0:{num_virtual_tokens}"
            return f"{expected}, {limits}", f"{start}:{stop}"
        twice = taken.intersection(range(start, stop))
        if twice:
            return "each virtual token at most once", f"{min(twice)} twice"
        taken.update(range(start, stop))
    return None


def _refused(expected: str, received: str) -> ArtifactRefused:
    return ArtifactRefused(
        "malformed_template",
        f"expected prompt_template to have {expected}; got {received}",
        param="metadata.prompt_template",
    )
