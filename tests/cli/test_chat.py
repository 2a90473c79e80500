"""A conversation in the terminal keeps its messages, and continues after an error."""

import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from prefixd.client import Client
from prefixd.server.cli.chat import Conversation, interact
from tests.cli.cli_runner import run
from tests.clients.loopback import Loopback


def _answer(text: str) -> bytes:
    chunk = f'{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}'
    return f"data: {chunk}\n\ndata: [DONE]\n\n".encode()


@pytest.fixture
def conversation(server: Loopback) -> Iterator[Conversation]:
    with Client(server.url) as client:
        yield Conversation(
            client=client, model="bob", sampling={"max_tokens": 8}, system="Be kind."
        )


def _type(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    pending = iter(lines)

    def read(*_: object) -> str:
        for line in pending:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)


def _sent(server: Loopback) -> list[tuple[str, list[str]]]:
    bodies = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    return [
        (body["model"], [message["content"] for message in body["messages"]]) for body in bodies
    ]


def test_earlier_messages_are_sent_again(
    conversation: Conversation, server: Loopback, monkeypatch: pytest.MonkeyPatch
):
    server.stream(_answer("Ahoy"), x_prefixd_prefix="bob@2", x_prefixd_prefix_digest="ff")
    server.stream(_answer("Aye"))
    server.stream(_answer("Dear"))
    _type(monkeypatch, "Hi", "", "/model carol", "And you?", "/new", "/help", "Hello")
    terminal = Console(file=io.StringIO(), width=100)
    interact(conversation, terminal)
    assert _sent(server) == [
        ("bob", ["Be kind.", "Hi"]),
        ("carol", ["Be kind.", "Hi", "Ahoy", "And you?"]),
        ("carol", ["Be kind.", "Hello"]),
    ]
    assert isinstance(terminal.file, io.StringIO)
    assert "bob@2" in terminal.file.getvalue()


def test_the_recipe_is_applied_and_warnings_are_shown(
    conversation: Conversation, server: Loopback, monkeypatch: pytest.MonkeyPatch
):
    server.models["mood"] = {"takes": "text", "temperature": 0.5, "max_tokens": 4}
    warned = _answer("Ahoy").replace(b'{"choices"', b'{"warnings":["[odd]"],"choices"', 1)
    for answer in (_answer("positive"), _answer("negative"), warned):
        server.stream(answer)
    conversation.system, conversation.sampling = None, {}
    conversation.clear()
    _type(monkeypatch, "/model mood", "Hi", "And you?", "/model bob", "Hello")
    terminal = Console(file=io.StringIO(), width=100)
    interact(conversation, terminal)
    contents = ["Hi", "positive", "And you?", "negative", "Hello"]
    assert _sent(server) == [("mood", ["Hi"]), ("mood", ["And you?"]), ("bob", contents)]
    fields = [seen.json for seen in server.seen if isinstance(seen.json, dict)]
    said = [(body.get("max_tokens"), body.get("temperature")) for body in fields]
    assert said == [(None, None), (None, None), (256, 0.0)]
    assert isinstance(terminal.file, io.StringIO)
    assert "[odd]" in terminal.file.getvalue()
    server.stream(warned)
    result = run("chat", "Hi", "--url", server.url, "--model", "mood", "--max-tokens", "9")
    assert (result.stdout, result.stderr) == ("Ahoy\n", "prefixd: [odd]\n")
    last = server.seen[-1].json
    assert isinstance(last, dict)
    assert (last["max_tokens"], "temperature" in last) == (9, False)


def test_content_parts_are_read_from_json(server: Loopback) -> None:
    parts = '[{"type": "text", "text": "[1]"}, {"type": "prefix", "from": 0, "to": 4}]'
    options = ("--url", server.url, "--model", "bob", "--parts")
    server.stream(_answer("Ahoy"))
    assert run("chat", parts, *options).output == "Ahoy\n"
    assert _sent(server) == [("bob", [json.loads(parts)])]
    for wrong in ("Hi", "[1]", '{"type": "text"}'):
        refused = run("chat", wrong, *options, code=2)
        assert "list of content parts" in " ".join(refused.output.split())
    server.stream(_answer("Ahoy"))
    run("chat", parts, *options[:-1])
    assert _sent(server)[1] == ("bob", [parts]), "without the flag it is text"


def test_a_rejected_message_is_removed(
    conversation: Conversation, server: Loopback, monkeypatch: pytest.MonkeyPatch
):
    server.reply({"error": {"message": "no prefix [nope]"}}, status=404)
    server.stream(_answer("Ahoy"))
    _type(monkeypatch, "Hi", "Again")
    terminal = Console(file=io.StringIO(), width=100)
    interact(conversation, terminal)
    assert _sent(server)[1] == ("bob", ["Be kind.", "Again"])
    assert isinstance(terminal.file, io.StringIO)
    assert "404 no prefix [nope]" in terminal.file.getvalue()


def test_an_interrupted_answer_keeps_the_received_text(
    conversation: Conversation, server: Loopback, monkeypatch: pytest.MonkeyPatch
):
    server.stream(_answer("Ahoy").replace(b"data: [DONE]\n\n", b""), endless=True)

    def interrupted(text: str) -> None:
        if text == "Ahoy":
            raise KeyboardInterrupt

    conversation.send("Hi", interrupted)
    assert conversation.messages[-1] == {"role": "assistant", "content": "Ahoy"}
    assert server.hung_up.wait(30)
