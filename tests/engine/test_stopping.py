"""Stop strings: whatever the pieces, the text is the same, and nothing leaks."""

from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.engine.output_processor import StopStrings

letters = st.text(alphabet="ab<>", max_size=30)


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None, list[str]]:
    watcher = StopStrings(stops)
    sent: list[str] = []
    for piece in pieces:
        text, hit = watcher.push(piece)
        sent.append(text)
        if hit is not None:
            return "".join(sent), hit, sent
    sent.append(watcher.flush())
    return "".join(sent), None, sent


@given(
    pieces=st.lists(letters, max_size=8),
    stops=st.lists(st.text(alphabet="ab<>", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_first_stop_string_ends_the_text(pieces: list[str], stops: tuple[str, ...]) -> None:
    text, hit, _ = run(pieces, stops)
    whole = "".join(pieces)
    if hit is None:
        assert text == whole
        assert not any(stop in whole for stop in stops)
    else:
        assert hit in stops
        assert whole.startswith(text + hit)
        assert not any(stop in text for stop in stops)


def test_text_goes_out_as_soon_as_it_can() -> None:
    _, _, sent = run(["he", "llo<", "b", ">"], ("<a>",))
    assert sent == ["he", "llo", "<b", ">", ""]
