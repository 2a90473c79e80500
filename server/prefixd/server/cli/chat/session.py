"""The chat in a terminal: questions, and commands that begin with a slash."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

import anyio
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefixd.client.aio import AsyncClient
from prefixd.client.errors import ClientError
from prefixd.server.cli.chat.conversation import Answer, Conversation
from prefixd.server.cli.chat.view import (
    ComparedView,
    SingleView,
    View,
    error_line,
    notes,
    one_line,
)
from prefixd.server.cli.output import printable

T = TypeVar("T")

REDRAW_SECONDS = 0.1

HELP = (
    (
        "/prefix [NAME]",
        "answer under NAME, NAME@3 or NAME@alias; alone: the bare base",
    ),
    ("/user [NAME]", "the end user, whose bound prefix the base answers under; alone: none"),
    ("/compare A B [QUESTION]", "both answer it, or the next one, without the turns before it"),
    ("/system [TEXT]", "the system message; alone: none"),
    ("/reset", "forget the questions and answers so far"),
    ("/help", "this list"),
    ("/exit", "end, as Ctrl-D does; Ctrl-C stops an answer"),
    ("", "a question that begins with a slash: put a space in front"),
)


class Caller:
    """One client on one event loop, for calls from code that is not asynchronous. Ctrl-C cancels
    the call that runs, which closes its connection, and raises KeyboardInterrupt."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self._loop = asyncio.Runner()

    def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        async def awaited() -> T:
            return await call()

        return self._loop.run(awaited())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._loop:
            self(self.client.close)


class Session:
    """A conversation with the person at the terminal. ``read`` returns the next line for a prompt;
    it raises EOFError at the end, UnicodeDecodeError for a line that is not text."""

    def __init__(
        self,
        run: Caller,
        conversation: Conversation,
        console: Console,
        read: Callable[[str], str],
        *,
        base: str,
        prefixes: Sequence[str] = (),
    ) -> None:
        self._run = run
        self.conversation = conversation
        self._console = console
        self._read = read
        self._base = base
        self._prefixes = tuple(prefixes)
        self._compared: tuple[str, str] | None = None
        self._is_over = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/prefix": self._set_prefix,
            "/user": self._set_user,
            "/compare": self._compare,
            "/system": self._set_system,
            "/reset": self._reset,
            "/help": self._help,
            "/exit": self._exit,
        }

    @property
    def words(self) -> Sequence[str]:
        """What may be typed: commands, and names of models."""
        return (*self._commands, *self._prefixes, self._base)

    def interact(self) -> None:
        """Answer lines until the end of input. An error is shown, and the conversation goes on."""
        self._say("/help lists the commands, Ctrl-D ends.")
        while not self._is_over:
            try:
                line = self._read(self._prompt())
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                continue
            except UnicodeDecodeError as error:
                self._say(f"expected text in UTF-8; the line is not, from byte {error.start}")
                continue
            try:
                self._line(line)
            except ClientError as error:
                self._console.print(error_line(error))
            except KeyboardInterrupt:
                self._say("stopped")

    def _line(self, line: str) -> None:
        name, _, argument = line.rstrip().partition(" ")
        if name.startswith("/"):
            command = self._commands.get(name)
            if command is None:
                self._say(f"no command {one_line(name)[:40]}: /help lists them")
            else:
                command(argument.strip())
        elif question := line.strip():
            self._answer(question) if self._compared is None else self._answer_both(question)

    def _prompt(self) -> str:
        compared, user = self._compared, self.conversation.user
        model = " | ".join(compared) if compared else self.conversation.model
        return printable(f"{model} ({user})> " if user else f"{model}> ")

    def _say(self, text: str) -> None:
        self._console.print(Text(printable(text), style="dim"))

    # -- answers ----------------------------------------------------------------------------------

    def _answer(self, question: str) -> None:
        answer = Answer(self.conversation.model)
        view = SingleView(self._console, answer)
        is_complete = self._stream(self.conversation, question, [answer], view)
        for note in notes(answer) if is_complete else []:
            self._console.print(note)
        self.conversation.keep(question, answer)

    def _answer_both(self, question: str) -> None:
        assert self._compared is not None
        answers = [Answer(model) for model in self._compared]
        self._compared = None
        # The turns so far are answers of one model, which the other would imitate.
        fresh = replace(self.conversation, turns=[])
        self._stream(fresh, question, answers, ComparedView(self._console, answers))

    def _stream(
        self, asked: Conversation, question: str, answers: Sequence[Answer], view: View
    ) -> bool:
        """Let all answers come at the same time; False when Ctrl-C stopped them."""

        async def draw_regularly() -> None:
            while True:
                await anyio.sleep(REDRAW_SECONDS)
                view.draw()

        async def stream() -> None:
            async with anyio.create_task_group() as drawing:
                drawing.start_soon(draw_regularly)
                async with anyio.create_task_group() as asking:
                    for answer in answers:
                        asking.start_soon(asked.ask, self._run.client, question, answer)
                drawing.cancel_scope.cancel()

        try:
            with view:
                self._run(stream)
        except KeyboardInterrupt:
            self._say("stopped")
            return False
        return True

    # -- commands ---------------------------------------------------------------------------------

    def _set_prefix(self, name: str) -> None:
        shown = self._run(lambda: self._run.client.show_model(name or self._base))
        self.conversation.model = shown.id
        if shown.recipe is not None and shown.recipe.takes == "text":
            self._say("takes a text: each question goes by itself, without those before it")

    def _set_user(self, name: str) -> None:
        self.conversation.user = name or None
        if name and self.conversation.model != self._base:
            self._say(f"{self.conversation.model} stays; /prefix alone lets the user decide")

    def _compare(self, arguments: str) -> None:
        first, second, *question = [*arguments.split(maxsplit=2), "", ""][:3]
        if not second:
            self._say("expected /compare A B, or with a QUESTION behind them")
            return
        self._compared = (first, second)
        if question[0]:
            self._answer_both(question[0])

    def _set_system(self, text: str) -> None:
        self.conversation.system = text or None
        self._say("system message set" if text else "no system message")

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        self._say("questions and answers forgotten")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for row in HELP:
            table.add_row(*row, style="dim")
        self._console.print(table)

    def _exit(self, _: str) -> None:
        self._is_over = True
