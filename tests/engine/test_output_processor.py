"""Stop strings: the text is the same for any split into pieces, and no part of one is sent."""

from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.engine.output_processor import StopStrings

letters = st.text(alphabet="ab<>", max_size=30)


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None, list[str]]:
    stop_strings = StopStrings(stops)
    sent: list[str] = []
    for piece in pieces:
        text, stop = stop_strings.push(piece)
        sent.append(text)
        if stop is not None:
            return "".join(sent), stop, sent
    sent.append(stop_strings.flush())
    return "".join(sent), None, sent


@given(
    pieces=st.lists(letters, max_size=8),
    stops=st.lists(st.text(alphabet="ab<>", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_first_stop_string_ends_the_text(pieces: list[str], stops: tuple[str, ...]) -> None:
    text, stop, _ = run(pieces, stops)
    full_text = "".join(pieces)
    if stop is None:
        assert text == full_text
        assert not any(stop in full_text for stop in stops)
    else:
        assert stop in stops
        assert full_text.startswith(text + stop)
        assert not any(stop in text for stop in stops)


def test_text_is_sent_as_soon_as_it_is_final() -> None:
    _, _, sent = run(["he", "llo<", "b", ">"], ("<a>",))
    assert sent == ["he", "llo", "<b", ">", ""]
