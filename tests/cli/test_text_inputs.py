"""Text that is not UTF-8, in arguments, files, standard input and a terminal."""

from pathlib import Path

import pytest

from tests.cli.cli_runner import run
from tests.clients.loopback import Loopback

# As Python keeps the byte 0xff of an argument.
ARGUMENT = "aé\udcffb"
BYTES = b"a\xc3\xa9\xffb"


def refusal(*arguments: str, code: int = 2, standard_input: bytes | None = None) -> str:
    """What a verb writes to standard error."""
    result = run(*arguments, "--url", "http://127.0.0.1:9", code=code, input=standard_input)
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("chat", ARGUMENT), "MESSAGE"),
        (("chat", "Hi", "--system", ARGUMENT), "--system"),
        (("tokenize", ARGUMENT), "TEXT"),
        (("prefix", "push", "bob", "--text", ARGUMENT), "--text"),
        (("prefix", "push", "bob", "--text", "Hi", "--metadata", ARGUMENT), "--metadata"),
        (("prefix", "recipe", "bob", "--patch", ARGUMENT), "--patch"),
        (("prefix", "metadata", "bob", ARGUMENT), "PATCH"),
    ],
)
def test_an_argument_is_refused_with_its_name_and_the_place(
    arguments: tuple[str, ...], name: str
) -> None:
    assert f"{name} is not text in UTF-8, from byte 3" in refusal(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat",),
        ("chat", "--lines"),
        ("tokenize",),
        ("prefix", "recipe", "bob", "--file", "-"),
        ("prefix", "push", "bob", "-"),
    ],
)
def test_standard_input_is_refused_with_the_place(arguments: tuple[str, ...]) -> None:
    expected = "is not text in UTF-8, from byte 3"
    assert expected in refusal(*arguments, standard_input=BYTES)


@pytest.mark.parametrize(
    ("verb", "code"), [(("eval",), 1), (("prefix", "recipe", "bob", "--file"), 2)]
)
def test_a_file_is_refused_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(BYTES)
    assert "a.txt is not text in UTF-8, from byte 3" in refusal(*verb, "a.txt", code=code)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prefix", "show", ARGUMENT),
        ("prefix", "ls", "--label", f"a:{ARGUMENT}"),
        ("user", "bind", ARGUMENT, "bob"),
        ("user", "bind", "ann", ARGUMENT),
        ("chat", "Hi", "--model", ARGUMENT),
        ("tokenize", "Hi", "--user", ARGUMENT),
        ("prefix", "recipe", "bob", "--patch", r'{"prompt_template": "a\ud83d"}'),
    ],
)
def test_any_other_text_that_cannot_be_sent_is_one_message(arguments: tuple[str, ...]) -> None:
    assert "expected text that utf-8 encodes" in refusal(*arguments, code=1)


def test_carriage_returns_stay_in_a_text_of_which_tokens_are_asked(server: Loopback) -> None:
    server.reply({"tokens": [1], "count": 1, "max_model_len": 9, "num_virtual_tokens": 0})
    run("tokenize", "--url", server.url, input=b"a\r\nb")
    (body,) = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    assert body["prompt"] == "a\r\nb"
