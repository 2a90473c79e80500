"""``prefixd chat``: one answer, several, or a conversation in the terminal."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from prefixd.client.protocol import Sampling
from prefixd.client.types import CompletionChunk
from prefixd.server.cli.chat.conversation import (
    Answer,
    Conversation,
    Question,
    base_and_prefixes,
)
from prefixd.server.cli.chat.session import Caller, Session
from prefixd.server.cli.chat.typed_lines import TypedLines, history_file
from prefixd.server.cli.inputs import argument_text, input_text
from prefixd.server.cli.options import Connection, connecting
from prefixd.server.cli.output import client_message, console, printable

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


@connecting
def chat(
    connection: Connection,
    *,
    message: Annotated[
        str | None,
        typer.Argument(
            help="Answer this and end. Default: standard input, or a conversation where standard "
            "input and output are terminals."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A prefix (NAME, NAME@3, NAME@alias) or the base. Default: the base.",
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option("--user", "-u", help="Your end user, whose prefix the base answers under."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines",
            help="Each line of standard input is a question of one conversation. Default: all of "
            "it is one message.",
        ),
    ] = False,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts",
            help="The message is JSON: a list of content parts, such as "
            '{"type": "prefix", "from": 0, "to": 4} for virtual tokens.',
        ),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, help="Most tokens of one answer. Default: the recipe's, or 256."
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="Default: the recipe's, or 0, greedy."),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="Keep the lines typed in a conversation for the next one, in a file that only "
            "you can read (chat_history in $XDG_STATE_HOME/prefixd or ~/.local/state/prefixd).",
        ),
    ] = True,
) -> None:
    """Chat with the base or under a prefix, streaming, as the recipe of the prefix says.

    Without a message, and with standard input and output both terminals, it is a conversation,
    with answers rendered as Markdown. Its commands are /prefix, /user, /compare A B, /system,
    /reset, /help and /exit; Ctrl-C stops an answer, Ctrl-D ends it. Elsewhere the answers are plain
    text, and the exit status is 1 when a question failed.
    """
    if system is not None:
        system = argument_text(system, name="--system")
    sampling = Sampling()
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if temperature is not None:
        sampling["temperature"] = temperature
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    is_conversation = message is None and not lines and on_terminal
    if parts and (is_conversation or lines):
        raise typer.BadParameter("--parts needs a message")
    if lines and message is not None:
        raise typer.BadParameter("--lines reads standard input; it takes no message")
    questions = None if is_conversation else _questions(message, lines=lines, parts=parts)
    with Caller(connection.async_client()) as run:
        if questions is not None:
            conversation = Conversation(model or _base(run), sampling, system=system, user=user)
            _answer_plainly(run, conversation, questions)
            return
        base, prefixes = run(lambda: base_and_prefixes(run.client))
        conversation = Conversation(model or base, sampling, system=system, user=user)
        typed = TypedLines(history_file() if history else None, lambda: session.words)
        terminal = console()
        is_colored = terminal.color_system is not None and not terminal.no_color
        read = partial(typed.read, is_colored=is_colored)
        session = Session(run, conversation, terminal, read, base=base, prefixes=prefixes)
        session.interact()


def _base(run: Caller) -> str:
    base, _ = run(lambda: base_and_prefixes(run.client))
    return base


def _questions(message: str | None, *, lines: bool, parts: bool) -> Sequence[Question]:
    """What is asked without a conversation. Raises BadParameter."""
    if message is None:
        text = input_text("-").replace("\r\n", "\n").strip()
    else:
        text = argument_text(message, name="MESSAGE")
    if not text:
        raise typer.BadParameter("no message on standard input")
    if lines:
        return [line.strip() for line in text.split("\n") if line.strip()]
    return [_parts(text) if parts else text]


def _parts(text: str) -> list[dict[str, Any]]:
    """The content parts that ``text`` is. Raises BadParameter."""
    try:
        parts = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a JSON list of content parts: {error}") from None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise typer.BadParameter("expected a JSON list of content parts, which are objects")
    return parts


def _answer_plainly(run: Caller, conversation: Conversation, questions: Sequence[Question]) -> None:
    """Write the answers to standard output; an error of one ends the verb with status 1, after
    the others."""
    has_failed = False
    for question in questions:
        answer = Answer(conversation.model)
        try:
            run(lambda: conversation.ask(run.client, question, answer, _write_chunk))  # noqa: B023
        except KeyboardInterrupt:
            typer.echo(" …")
            raise typer.Exit(INTERRUPTED) from None
        if answer.text or answer.error is None:
            typer.echo()
        for warning in answer.warnings:
            typer.echo(f"prefixd: {printable(warning)}", err=True)
        if answer.error is not None:
            has_failed = True
            typer.echo(f"prefixd: {printable(client_message(answer.error))}", err=True)
        conversation.keep(question, answer)
    if has_failed:
        raise typer.Exit(1)


def _write_chunk(chunk: CompletionChunk) -> None:
    """Write unbuffered: tokens appear as they arrive."""
    sys.stdout.write(printable(chunk.text))
    sys.stdout.flush()
