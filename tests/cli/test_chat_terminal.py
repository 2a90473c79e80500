"""``prefixd chat`` in a pseudo terminal: keys, signals, and the file of typed lines."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixd.server.cli.chat import typed_lines
from tests.cli.test_chat import answer_of, sent
from tests.clients.loopback import Loopback

MAIN = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
from prefixd.server.cli.main import main
main()
"""
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


class Typist:
    """The verb in a pseudo terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
        )
        os.close(slave)
        self._unread = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, text: str) -> str:
        """The output up to ``text``, included."""
        while text not in self._unread:
            ready, _, _ = select.select([self._master], [], [], 30)
            assert ready, f"expected {text!r}; received {self._unread!r}"
            self._unread += os.read(self._master, 65536).decode(errors="replace")
        read, _, self._unread = self._unread.partition(text)
        return read + text

    def interrupt(self) -> None:
        """Ctrl-C at the prompt, until something is shown: readline does not see one that comes
        right before it waits for a key."""
        for _ in range(10):
            self.type(CTRL_C)
            if select.select([self._master], [], [], 3)[0]:
                return

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def typist(server: Loopback, tmp_path: Path) -> Iterator[Typist]:
    server.reply({"data": [{"id": "tiny"}, {"id": "bob", "parent": "tiny"}]})
    options = ("chat", "--url", server.url)
    typist = Typist(*options, XDG_STATE_HOME=str(tmp_path), INPUTRC="/dev/null", NO_COLOR="1")
    yield typist
    typist.close()


@pytest.mark.slow
def test_a_conversation_with_keys_and_signals(
    typist: Typist, server: Loopback, tmp_path: Path
) -> None:
    typist.wait_for("tiny> ")
    typist.type("/pre\tb\t\r")
    typist.wait_for("bob> ")
    server.stream(answer_of("**Ahoy**"))
    typist.type("Hi\r")
    assert "**" not in typist.wait_for("Ahoy")
    typist.wait_for("bob> ")
    server.stream(answer_of("Well").replace(b"data: [DONE]\n\n", b""), endless=True)
    typist.type("Go on\r")
    typist.wait_for("Well")
    typist.type(CTRL_C)
    typist.wait_for("stopped")
    assert server.hung_up.wait(30)
    typist.wait_for("bob> ")
    server.stream(answer_of("Aye"))
    typist.type("x")
    typist.wait_for("x")
    typist.interrupt()
    typist.wait_for("bob> ")
    typist.type(f"{UP}{UP}\r")
    typist.wait_for("Aye")
    typist.wait_for("bob> ")
    typist.type(CTRL_D)
    assert typist.process.wait(60) == 0
    turns = ["Hi", "**Ahoy**", "Go on", "Well", "Hi"]
    assert sent(server) == [("bob", turns[: 2 * count + 1]) for count in range(3)]
    file = tmp_path / "prefixd" / "chat_history"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == ["/prefix bob ", "Hi", "Go on", "Hi"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that readline has."""
    lines: list[str] = []
    monkeypatch.setattr("readline.add_history", lines.append)
    return lines


def type_lines(monkeypatch: pytest.MonkeyPatch, file: Path | None, *lines: str) -> None:
    typed = typed_lines.TypedLines(file, list)
    for line in lines:
        monkeypatch.setattr("builtins.input", lambda _, line=line: line)
        assert typed.read("> ", is_colored=False) == line


def test_typed_lines_are_recalled_by_the_next_chat(
    monkeypatch: pytest.MonkeyPatch, history: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "new" / "chat_history"
    type_lines(monkeypatch, file, "a", "a", " ", "two\nlines", "ß")
    assert history == ["a", "two\nlines", "ß"]
    history.clear()
    type_lines(monkeypatch, file)
    assert history == ["a", "two\nlines", "ß"]
    type_lines(monkeypatch, None, "secret")
    assert "secret" not in file.read_text()


def test_a_long_or_damaged_history_is_cut_and_read(
    monkeypatch: pytest.MonkeyPatch, history: list[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(typed_lines, "MAX_LINES", 3)
    file = tmp_path / "chat_history"
    file.write_text(
        "".join(f'"{number}"\n' for number in range(6)) + 'no JSON\n7\n"b\\u0000"\n"z"\n'
    )
    file.chmod(0o644)
    type_lines(monkeypatch, file)
    assert history == ["z"]
    assert file.read_text() == '7\n"b\\u0000"\n"z"\n'
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    type_lines(monkeypatch, file, "q")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"\xff")
    history.clear()
    type_lines(monkeypatch, file)
    assert history == []


def test_a_history_that_cannot_be_written_is_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch, history: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    type_lines(monkeypatch, tmp_path / "file" / "chat_history", "a")
    assert history == ["a"]
