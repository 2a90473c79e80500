"""``prefixd chat``: what is sent, the commands of a conversation, and plain answers elsewhere."""

import json
import os
import pty
import signal
from collections.abc import Iterator

import pytest

from prefixd.client import AsyncClient
from prefixd.server.cli.chat.conversation import Answer, Conversation
from prefixd.server.cli.chat.session import Caller, Session
from prefixd.server.cli.chat.view import ComparedView, SingleView
from prefixd.server.cli.main import app
from tests.cli.cli_runner import run
from tests.cli.screen import Screen
from tests.clients.loopback import Loopback

NO_BINDING = {"error": {"message": "no binding"}}


def answer_of(text: str) -> bytes:
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]})
    return f"data: {chunk}\n\ndata: [DONE]\n\n".encode()


def warned(text: str) -> bytes:
    return answer_of(text).replace(b'{"choices"', b'{"warnings": ["[odd]"], "choices"', 1)


class Terminal:
    """A conversation that types some lines; ``shown`` is what is then on the terminal."""

    def __init__(self, caller: Caller, conversation: Conversation) -> None:
        self.screen = Screen(100, 24)
        self.prompts: list[str] = []
        self._pending: list[str | BaseException] = []
        self.conversation = conversation
        self._session = Session(
            caller, conversation, self.screen.console, self._read, base="tiny", prefixes=["bob"]
        )

    def type(self, *lines: str | BaseException) -> None:
        self._pending = [*lines, EOFError()]
        self._session.interact()

    def _read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = self._pending.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    @property
    def shown(self) -> str:
        return self.screen.text


@pytest.fixture
def terminal(server: Loopback) -> Iterator[Terminal]:
    with Caller(AsyncClient(server.url)) as caller:
        yield Terminal(caller, Conversation("bob", {"max_tokens": 8}, system="Be kind."))


def sent(server: Loopback) -> list[tuple[str, list[str]]]:
    bodies = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    return [
        (body["model"], [message["content"] for message in body["messages"]]) for body in bodies
    ]


def test_earlier_turns_are_sent_again(terminal: Terminal, server: Loopback) -> None:
    server.stream(answer_of("*Ahoy*"), x_prefixd_prefix="bob@2", x_prefixd_prefix_digest="ff")
    for text in ("Aye", "Dear", "Bare", "No system"):
        server.stream(answer_of(text))
    questions = ["Hi", "", "/prefix carol", "And you?", "/reset", "/prefix", " /Hello", "/system"]
    terminal.type(*questions, "Hm", "/exit", "never asked")
    assert sent(server) == [
        ("bob", ["Be kind.", "Hi"]),
        ("carol", ["Be kind.", "Hi", "*Ahoy*", "And you?"]),
        ("tiny", ["Be kind.", "/Hello"]),
        ("tiny", ["/Hello", "Dear", "Hm"]),
    ]
    server.replies.clear()
    assert "\nAhoy\nbob@2\n" in f"\n{terminal.shown}\n"
    assert list(dict.fromkeys(terminal.prompts)) == ["bob> ", "carol> ", "tiny> "]


def test_a_line_that_is_not_text_is_refused_and_the_conversation_goes_on(
    terminal: Terminal, server: Loopback
) -> None:
    server.stream(answer_of("Ahoy"))
    not_text = UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte")
    terminal.type(not_text, "a\udcff", "Hi")
    assert "expected text in UTF-8; the line is not, from byte 1" in terminal.shown
    assert "expected text that utf-8 encodes" in terminal.shown
    assert sent(server)[-1][1][-1] == "Hi"


def test_recipes_are_applied_as_they_are_now(terminal: Terminal, server: Loopback) -> None:
    server.models["mood"] = {"takes": "text", "temperature": 0.5, "max_tokens": 4}
    for answer in ("positive", "negative", "Ahoy"):
        server.stream(warned(answer))
    terminal.conversation.system, terminal.conversation.sampling = None, {}
    terminal.type("/prefix mood", "Hi", "And you?", "/prefix bob", "Hello")
    turns = ["Hi", "positive", "And you?", "negative", "Hello"]
    assert sent(server) == [("mood", ["Hi"]), ("mood", ["And you?"]), ("bob", turns)]
    fields = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    said = [(body.get("max_tokens"), body.get("temperature")) for body in fields]
    assert said == [(None, None), (None, None), (256, 0.0)]
    assert "[odd]" in terminal.shown
    assert "each question goes by itself" in terminal.shown
    server.models["mood"] = {"takes": "chat"}
    server.stream(answer_of("x"))
    terminal.type("/prefix mood", "Again")
    assert sent(server)[-1] == ("mood", [*turns, "Ahoy", "Again"])


def test_the_prefix_of_a_user_decides_how_the_base_is_called(
    terminal: Terminal, server: Loopback
) -> None:
    server.models["mood"] = {"takes": "text", "max_tokens": 4}
    terminal.conversation.sampling = {}
    binding = {"user": "ann", "prefix": "mood", "updated_at": "2026-01-01T00:00:00Z"}
    chosen = {"x_prefixd_prefix": "mood@1", "x_prefixd_prefix_digest": "ff"}
    server.reply(binding)
    server.stream(answer_of("positive"), **chosen, x_prefixd_prefix_chosen_by="user")  # type: ignore[arg-type]
    server.reply(NO_BINDING, status=404)
    server.reply({"prefix": "mood"})
    server.stream(answer_of("negative"))
    server.reply(NO_BINDING, status=404)
    server.reply(NO_BINDING, status=404)
    server.stream(answer_of("Hello"))
    server.stream(answer_of("Bye"))
    terminal.type("/user ann", "/prefix", "Hi", "Ho", "/user eve", "He", "/user", "Hu")
    assert [one[1][-1] for one in sent(server)] == ["Hi", "Ho", "He", "Hu"]
    fields = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    assert [body.get("user") for body in fields] == ["ann", "ann", "eve", None]
    assert ["max_tokens" in body for body in fields] == [False, False, True, True]
    assert [len(body["messages"]) for body in fields] == [2, 2, 6, 8]
    assert "mood@1, chosen by user" in terminal.shown
    assert "bob stays" in terminal.shown
    assert "tiny (eve)> " in terminal.prompts


def test_a_comparison_asks_both_without_turns_and_keeps_neither(
    terminal: Terminal, server: Loopback
) -> None:
    for text in ("First", "Ahoy", "Ahoy", "Dear", "Dear", "Aye"):
        server.stream(answer_of(text))
    terminal.type("Hello", "/compare bob carol Who are you?", "/compare a b", "And you?")
    terminal.type("/compare a", "Hi")
    asked = sent(server)[1:]
    assert sorted(asked[:2]) == [
        ("bob", ["Be kind.", "Who are you?"]),
        ("carol", ["Be kind.", "Who are you?"]),
    ]
    assert sorted(asked[2:4]) == [("a", ["Be kind.", "And you?"]), ("b", ["Be kind.", "And you?"])]
    assert asked[4:] == [("bob", ["Be kind.", "Hello", "First", "Hi"])]
    lines = [line.split() for line in terminal.shown.splitlines()]
    assert ["bob", "carol"] in lines
    assert ["Ahoy", "Ahoy"] in lines
    assert "expected /compare A B" in terminal.shown
    assert "a | b> " in terminal.prompts


def test_compared_models_answer_at_the_same_time_until_ctrl_c(
    terminal: Terminal, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        server.stream(answer_of("Ahoy").replace(b"data: [DONE]\n\n", b""), endless=True)
    draw = ComparedView.draw

    def draw_until_both_came(view: ComparedView) -> None:
        draw(view)
        if terminal.shown.count("Ahoy") == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ComparedView, "draw", draw_until_both_came)
    terminal.type("/compare a b Hi")
    assert terminal.shown.splitlines()[-1] == "stopped"
    assert server.hung_up.wait(30)


def test_an_answer_that_members_vote_on_comes_whole(terminal: Terminal, server: Loopback) -> None:
    refusal = {"message": "no stream", "code": "unsupported_ensemble", "param": "stream"}
    server.reply({"error": refusal}, status=400)
    choice = {"index": 0, "message": {"content": "Ahoy"}, "finish_reason": "stop"}
    server.reply({"id": "x", "model": "bob", "choices": [choice], "warnings": ["[odd]"]})
    server.stream(answer_of("Aye"))
    terminal.type("Hi", "Again")
    assert "Ahoy" in terminal.shown
    assert "[odd]" in terminal.shown
    assert "no stream" not in terminal.shown
    assert sent(server)[-1] == ("bob", ["Be kind.", "Hi", "Ahoy", "Again"])


@pytest.mark.parametrize(
    ("status", "message"), [(404, "no prefix [nope]"), (401, "the key\nis revoked"), (503, "full")]
)
def test_an_error_is_one_line_and_the_conversation_goes_on(
    terminal: Terminal, server: Loopback, status: int, message: str
) -> None:
    server.reply({"error": {"message": message}}, status=status, retry_after="99")
    server.stream(answer_of("Ahoy"))
    terminal.type("Hi", "/nothing", "Again")
    assert sent(server)[1] == ("bob", ["Be kind.", "Again"]), "the failed question is not kept"
    lines = terminal.shown.splitlines()
    assert f"{status} {' '.join(message.split())}" in lines
    assert "no command /nothing: /help lists them" in lines


def test_an_answer_that_fails_after_its_beginning_is_not_kept(
    terminal: Terminal, server: Loopback
) -> None:
    failing = (
        b'data: {"error": {"message": "stopping", "code": "shutting_down"}}\n\ndata: [DONE]\n\n'
    )
    server.stream(answer_of("Aho").replace(b"data: [DONE]\n\n", failing))
    server.stream(answer_of("Aye"))
    terminal.type("Hi", "Again")
    assert sent(server)[1] == ("bob", ["Be kind.", "Again"])
    assert "\nAho\n503 stopping\n" in terminal.shown


def test_ctrl_c_at_the_prompt_drops_the_line(terminal: Terminal, server: Loopback) -> None:
    server.stream(answer_of("Ahoy"))
    terminal.type(KeyboardInterrupt(), "Hi", "/help")
    assert "Ahoy" in terminal.shown
    assert "/compare A B [QUESTION]" in terminal.shown


def test_ctrl_c_closes_the_connection_and_keeps_the_text_so_far(
    terminal: Terminal, server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stream(answer_of("Ahoy").replace(b"data: [DONE]\n\n", b""), endless=True)
    server.stream(answer_of("Aye"))
    draw = SingleView.draw

    def draw_until_it_came(view: SingleView) -> None:
        draw(view)
        if terminal.shown.endswith("Ahoy"):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SingleView, "draw", draw_until_it_came)
    terminal.type("Hi", "Go on")
    assert server.hung_up.wait(30)
    assert "\nAhoy\nstopped\nAye\n" in terminal.shown
    assert sent(server)[1] == ("bob", ["Be kind.", "Hi", "Ahoy", "Go on"])


def test_a_question_without_any_answer_is_not_kept(terminal: Terminal) -> None:
    terminal.conversation.keep("Hi", Answer("bob"))
    assert terminal.conversation.turns == []


# ── Without a terminal ───────────────────────────────────────────────────────────────────────


def test_content_parts_are_read_from_json(server: Loopback) -> None:
    parts = '[{"type": "text", "text": "[1]"}, {"type": "prefix", "from": 0, "to": 4}]'
    options = ("--url", server.url, "--model", "bob", "--parts")
    server.stream(answer_of("Ahoy"))
    assert run("chat", parts, *options).output == "Ahoy\n"
    assert sent(server) == [("bob", [json.loads(parts)])]
    for wrong in ("Hi", "[1]", '{"type": "text"}'):
        refused = run("chat", wrong, *options, code=2)
        assert "list of content parts" in " ".join(refused.output.split())
    server.stream(answer_of("Ahoy"))
    run("chat", parts, *options[:-1])
    assert sent(server)[1] == ("bob", [parts]), "without the flag it is text"


def test_a_plain_answer_is_text_and_what_is_worth_knowing_is_not_part_of_it(
    server: Loopback,
) -> None:
    server.models["mood"] = {"takes": "text"}
    server.stream(warned("*Ahoy* \x1b[2J"))
    result = run("chat", "Hi", "--url", server.url, "--model", "mood", "--max-tokens", "9")
    assert (result.stdout, result.stderr) == ("*Ahoy* \\u001b[2J\n", "prefixd: [odd]\n")
    last = server.seen[-1].json
    assert isinstance(last, dict)
    assert (last["max_tokens"], last["temperature"]) == (9, 0.0)


def test_standard_input_is_one_message_or_with_lines_several(server: Loopback) -> None:
    options = ("chat", "--url", server.url, "--model", "bob")
    server.stream(answer_of("Ahoy"))
    assert run(*options, input="Dear all,\n\nHi\n").stdout == "Ahoy\n"
    assert sent(server).pop() == ("bob", ["Dear all,\n\nHi"])
    server.stream(answer_of("one"))
    server.reply({"error": {"message": "full"}}, status=503, retry_after="99")
    server.stream(answer_of("three"))
    failed = run(*options, "--lines", input="a\u2028A\n\nb\n/c\n", code=1)
    assert failed.stdout == "one\nthree\n"
    assert failed.stderr == "prefixd: full\n"
    assert sent(server)[1:] == [
        ("bob", ["a\u2028A"]),
        ("bob", ["a\u2028A", "one", "b"]),
        ("bob", ["a\u2028A", "one", "/c"]),
    ]
    assert "no message" in run(*options, input=" \n", code=2).output
    run(*options, "Hi", "--lines", code=2)


def test_output_into_a_file_is_the_answer_also_when_the_message_is_typed(
    server: Loopback, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stream(answer_of("Ahoy"))
    master, terminal = pty.openpty()
    os.write(master, b"Hi\n\x04")  # Ctrl-D
    with os.fdopen(terminal, encoding="utf-8") as typed:
        monkeypatch.setattr("sys.stdin", typed)
        app(["chat", "--url", server.url, "--model", "bob"], standalone_mode=False)
    os.close(master)
    assert capsys.readouterr().out == "Ahoy\n"
    assert sent(server) == [("bob", ["Hi"])]


def test_ctrl_c_ends_a_plain_answer_with_status_130(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stream(answer_of("Ahoy").replace(b"data: [DONE]\n\n", b""), endless=True)
    monkeypatch.setattr(
        "prefixd.server.cli.chat._write_chunk", lambda _: signal.raise_signal(signal.SIGINT)
    )
    run("chat", "Hi", "--url", server.url, "--model", "bob", code=130)
    assert server.hung_up.wait(30)
