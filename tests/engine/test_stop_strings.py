"""Stop strings: the text is the same for any split into pieces, and no part of one is sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.engine.detokenizer import TokenText
from prefixd.server.engine.stop_strings import StopStrings

letters = st.text(alphabet="ab<>", max_size=30)
stops_of_letters = st.lists(st.text(alphabet="ab<>", min_size=1, max_size=4), max_size=3).map(tuple)

END, END_LETTER = "<a>", "E"
"""A special token, and a letter for it in strings that are compared."""


def run(
    tokens: list[TokenText], stops: tuple[str, ...], *, include: bool = False
) -> tuple[str, str | None, list[str]]:
    stop_strings = StopStrings(stops, include=include)
    sent: list[str] = []
    for token in tokens:
        text, stop = stop_strings.push_tokens([token])
        sent.append(text)
        if stop is not None:
            return "".join(sent), stop, sent
    sent.append(stop_strings.flush())
    return "".join(sent), None, sent


@given(pieces=st.lists(letters, max_size=8), stops=stops_of_letters)
def test_first_stop_string_ends_the_text(pieces: list[str], stops: tuple[str, ...]) -> None:
    text, stop, _ = run([TokenText(piece) for piece in pieces], stops)
    full_text = "".join(pieces)
    if stop is None:
        assert text == full_text
        assert not any(stop in full_text for stop in stops)
    else:
        assert stop in stops
        assert full_text.startswith(text + stop)
        assert not any(stop in text for stop in stops)


def test_text_is_sent_as_soon_as_it_is_final() -> None:
    _, _, sent = run([TokenText(piece) for piece in ("he", "llo<", "b", ">")], ("<a>",))
    assert sent == ["he", "llo<"[:-1], "<b", ">", ""]


tokens_of_letters = st.lists(
    st.one_of(
        st.text(alphabet="xy", max_size=2).map(TokenText),
        st.just(TokenText("", END)),
        st.text(alphabet="xy", max_size=1).map(lambda text: TokenText(text, END)),
    ),
    max_size=10,
)


@given(
    tokens=tokens_of_letters,
    stop=st.text(alphabet=f"xy{END_LETTER}", min_size=1, max_size=3),
    include=st.booleans(),
)
def test_stop_string_may_contain_special_tokens(
    tokens: list[TokenText], stop: str, include: bool
) -> None:
    ended_by = stop.replace(END_LETTER, END)
    cut, written, shown = None, "", ""
    for letter in "".join(token.text + END_LETTER * bool(token.special) for token in tokens):
        written += letter
        shown = written.replace(END_LETTER, "")
        cuts = [shown.find(stop)] if stop in shown else []
        if stop in written:
            cuts.append(len(written.partition(stop)[0].replace(END_LETTER, "")))
        if cuts:
            cut = min(cuts)
            break
    text, end, sent = run(tokens, (ended_by,), include=include)
    assert end == (None if cut is None else ended_by)
    assert text == shown[:cut] + (ended_by if include and cut is not None else "")
    assert END not in "".join(sent[:-1])


@pytest.mark.parametrize("stop", ["a", "<", "x<", ">y", "a>y"])
def test_part_of_a_special_token_is_no_stop_string(stop: str) -> None:
    assert run([TokenText("x"), TokenText("", END), TokenText("y")], (stop,))[:2] == ("xy", None)


@given(
    tokens=tokens_of_letters,
    start=tokens_of_letters,
    stop=st.text(alphabet=f"xy{END_LETTER}", min_size=1, max_size=3),
)
def test_a_preview_of_tokens_changes_nothing(
    start: list[TokenText], tokens: list[TokenText], stop: str
) -> None:
    stop_strings = StopStrings((stop.replace(END_LETTER, END),))
    if stop_strings.push_tokens(start)[1] is not None:
        return
    before = repr(stop_strings)
    would_end = stop_strings.would_end(tokens)
    assert repr(stop_strings) == before
    if len(tokens) < stop_strings.reach:
        assert would_end == (stop_strings.push_tokens(tokens)[1] is not None)
