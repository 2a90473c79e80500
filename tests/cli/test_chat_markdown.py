"""Answers on a terminal: complete above the screen, each line once, and harmless."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from prefixd.client.errors import RateLimitError
from prefixd.client.types import PrefixUsed
from prefixd.server.cli.chat.conversation import Answer
from prefixd.server.cli.chat.markdown import Printable, complete_blocks, markdown
from prefixd.server.cli.chat.view import ComparedView, SingleView, notes
from prefixd.server.cli.output import printable
from tests.cli.screen import Screen

LONG = "\n".join(f"{number}. item {number}" for number in range(1, 31))
PIECES = [
    *(
        "# Bread\n",
        "Mix *flour*",
        " and `water`.\n",
        "\n",
        "\n\n",
        "- a\n- b\n",
        "  more\n",
        "1. one\n",
    ),
    *(
        "2. two\n",
        "```python\n",
        "print('[red]x[/red]')\n",
        "```\n",
        "---\n",
        "> quoted\n",
        "    code\n",
    ),
    *(
        "| a | b |\n|---|---|\n| 1 | 2 |\n",
        "東京 🦊 Grüß dich\n",
        "<div>\n",
        "[1]: http://x\n",
        "*",
        "1",
    ),
    "&#x202e;",
    "\x1b[31m",
    "[red]not red[/red] :smile:",
    "=====\n",
    "word " * 30,
    LONG,
]


def whole(text: str, width: int) -> str:
    """``text`` rendered in one piece."""
    screen = Screen(width, 1000)
    screen.console.print(Printable(markdown(text)))
    return screen.text


def filled(shown: str) -> list[str]:
    """The lines that are not empty: rich separates some blocks otherwise in one piece."""
    return [line for line in shown.splitlines() if line.strip()]


def streamed(pieces: list[str], screen: Screen) -> str:
    """What is on the terminal after an answer of these pieces, drawn after each."""
    answer = Answer("m")
    with SingleView(screen.console, answer) as view:
        for piece in pieces:
            answer.text += piece
            view.draw()
    return screen.text


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=10), st.sampled_from([24, 80]))
@example(["1. one\n", "\n", "1", "0. ten\n"], 80)
@example(["para\n", "---\n", "\n", "after\n"], 80)
@example(["# Bread\n", "- a\n- b\n"], 24)
def test_a_streamed_answer_is_the_same_as_a_whole_one(pieces: list[str], width: int) -> None:
    expected = whole(printable("".join(pieces)), width)
    shown = streamed(pieces, Screen(width, 8))
    assert filled(shown) == filled(expected)


def test_blocks_are_separated_by_one_empty_line() -> None:
    text = "# Bread\n- a\n- b\n\nMix.\n***\nBake.\n"
    assert streamed([text[:20], text[20:]], Screen(20, 8)) == (
        "       Bread\n\n • a\n • b\n\nMix.\n\n--------------------\n\nBake."
    )


def test_every_line_of_an_answer_longer_than_the_screen_is_kept_once() -> None:
    code = "\n".join(f"line {number}" for number in range(40))
    text = f"Before.\n\n```\n{code}\n```\n\n{LONG}\n\nAfter."
    cut = range(0, len(text) + 30, 30)
    shown = streamed([text[a:b] for a, b in pairwise(cut)], Screen(40, 10)).splitlines()
    for line in ("Before.", "After.", *code.splitlines(), *(f"item {n}" for n in range(1, 31))):
        assert sum(shown_line.strip().endswith(line) for shown_line in shown) == 1, line


def test_what_is_redrawn_fits_the_screen() -> None:
    screen = Screen(40, 10)
    answer = Answer("m")
    with SingleView(screen.console, answer) as view:
        answer.text = LONG
        view.draw()
        rows = screen.text.splitlines()
        assert rows[-1].strip() == "30 item 30"
        assert len(rows) < screen.height


def test_complete_blocks_end_where_the_last_block_begins() -> None:
    assert complete_blocks("") == 0
    assert complete_blocks("one line") == 0
    assert complete_blocks("a\n\nb") == 0, "b may become anything"
    assert complete_blocks("a\n\nb\n") == len("a\n\n")
    assert complete_blocks("a\u2028b\n\nc\n") == len("a\u2028b\n\n")
    assert complete_blocks("- a\n\n1") == 0
    assert complete_blocks("```\na\n\nb\n\n") == 0, "an open code block grows"


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "a\rb",
        "\x9b31m",
        "&#27;[2J",
        "&#x9b;31m",
        "&#x202e;abc",
        *(
            "&#13;x",
            "[a](http://x\x1b[2J)",
            "[\x1b](http://x)",
            "```\x1b[2J\n\x1b[2J\n```",
            "`\x1b[2J`",
        ),
        "    \x1b[2J",
        "| \x1b[2J | b |\n|---|---|\n| &#x202e; | \x9b |",
        "# \x1b[2J",
        "<b>\x1b[2J</b>",
        "![\x1b](http://x)",
    ],
)
def test_no_control_sequence_of_a_model_reaches_the_terminal(text: str) -> None:
    screen = Screen(60, 20)
    plain = Console(file=screen.file, width=60, force_terminal=True, color_system=None)
    answer = Answer(text, text=text, reasoning=text, warnings=(text,))
    answer.error = RateLimitError(text, status=429)
    with SingleView(plain, answer) as view:
        view.draw()
    with ComparedView(plain, [answer, answer]) as both:
        both.draw()
    answer.error = None
    answer.prefix = PrefixUsed(name="x", version=1, digest="ff", chosen_by=text)
    for note in notes(answer):
        plain.print(note)
    sent = screen.file.getvalue()
    for harmless in ("\x1b[2K", "\x1b[1A", "\x1b[?25l", "\x1b[?25h", "\r"):
        sent = sent.replace(harmless, "")
    assert not {c for c in sent if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160)}
    assert "\u202e" not in sent


def test_markup_html_links_and_line_breaks_are_shown_as_written() -> None:
    text = "[bold]a[/bold] :smile: <think>\n[bank](http://evil) ![i](http://x) List<int>"
    assert whole(text, 100) == (
        "[bold]a[/bold] :smile: <think>\nbank (http://evil) !i (http://x) List<int>"
    )
    assert whole("<div>\nhtml\n</div>", 100) == "<div>\nhtml\n</div>"


def test_reasoning_is_dimmed_and_before_the_answer() -> None:
    screen = Screen(40, 12)
    answer = Answer("m")
    with SingleView(screen.console, answer) as view:
        assert screen.text == "…"
        answer.reasoning = "They greet.\nSo [I] d"
        view.draw()
        assert screen.text == "They greet.\nSo [I] d" or "So [I] d" in screen.text
        answer.reasoning += "o."
        answer.text = "Hi"
        view.draw()
        sent = screen.file.getvalue()
        assert "\x1b[2m" in sent
    assert screen.text == "They greet.\nSo [I] do.\n\nHi"


def compared(width: int) -> str:
    screen = Screen(width, 12)
    answers = [Answer("bob", text=LONG), Answer("the [base]", text="*short*")]
    with ComparedView(screen.console, answers) as view:
        view.draw()
        assert len(screen.text.splitlines()) < screen.height
        assert "30 item 30" in screen.text
    answers[1].warnings = ("odd",)
    return screen.text


def test_compared_answers_stand_side_by_side_under_their_names() -> None:
    shown = compared(90).splitlines()
    assert shown[0].split() == ["bob", "the", "[base]"]
    assert shown[1].split() == ["1", "item", "1", "short"]
    assert [line.split()[-1] for line in shown[2:]] == [str(n) for n in range(2, 31)]


def test_compared_answers_stand_one_below_the_other_on_a_narrow_terminal() -> None:
    shown = compared(40).splitlines()
    assert shown[0].strip("─ ") == "bob"
    assert [line.split()[-1] for line in shown[1:31]] == [str(n) for n in range(1, 31)]
    assert shown[31].strip("─ ") == "the [base]"
    assert shown[32] == "short"
