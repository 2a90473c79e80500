"""``prefixd chat``: one answer, or a conversation in the terminal."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from prefixd.client.errors import ApiError
from prefixd.client.protocol import Message, Sampling
from prefixd.client.sync import Client, Stream
from prefixd.client.types import Recipe
from prefixd.server.cli.options import connected
from prefixd.server.cli.output import console, printable

DEFAULTS = {"max_tokens": 256, "temperature": 0.0}
"""What neither the options nor the recipe say."""

HELP = "/model REF changes the prefix, /new clears the conversation, Ctrl-D ends."


@connected
def chat(
    client: Client,
    *,
    message: Annotated[
        str | None,
        typer.Argument(help="Answer this and end. Default: standard input, or a conversation."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A prefix (NAME, NAME@3, NAME@alias) or the base. Default: the base.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
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
) -> None:
    """Chat with the base or under a prefix, streaming, as the recipe of the prefix says."""
    sampling = Sampling()
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    if temperature is not None:
        sampling["temperature"] = temperature
    conversation = Conversation(
        client=client, model=model or _base(client), sampling=sampling, system=system
    )
    if message is None and sys.stdin.isatty():
        if parts:
            raise typer.BadParameter("--parts needs a message")
        interact(conversation, console())
        return
    text = sys.stdin.read().strip() if message is None else message
    if not text:
        raise typer.BadParameter("no message on standard input")
    stream = conversation.send(_parts(text) if parts else text, write)
    write("\n")
    for warning in stream.warnings:
        typer.echo(f"prefixd: {printable(warning)}", err=True)


def _parts(text: str) -> list[dict[str, Any]]:
    """The content parts that ``text`` is. Raises BadParameter."""
    try:
        parts = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a JSON list of content parts: {error}") from None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise typer.BadParameter("expected a JSON list of content parts, which are objects")
    return parts


def _base(client: Client) -> str:
    return next(model.id for model in client.list_models() if model.parent is None)


@dataclass
class Conversation:
    """The messages so far, and the model they go to. ``sampling`` goes before the recipe of the
    model, which goes before DEFAULTS."""

    client: Client
    model: str
    sampling: Sampling
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start over, with the system message alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def send(self, message: str | list[dict[str, Any]], write: Callable[[str], None]) -> Stream:
        """Send ``message``, text or content parts, and pass each piece of the answer to ``write``.

        A model that takes a text gets each message by itself, without the earlier ones.
        After an API error the message is removed, so that the conversation can continue. After
        Ctrl-C what was received until then is kept as the answer.
        """
        recipe = self._recipe()
        self.messages.append({"role": "user", "content": message})
        sent = self.messages
        if recipe.takes == "text":
            sent = [turn for turn in sent[:1] if turn["role"] == "system"] + sent[-1:]
        unsaid = {name: value for name, value in DEFAULTS.items() if getattr(recipe, name) is None}
        pieces: list[str] = []
        sampling = Sampling(**{**unsaid, **self.sampling})  # type: ignore[typeddict-item]
        stream = self.client.stream_chat(sent, model=self.model, **sampling)
        try:
            with stream:
                for chunk in stream:
                    pieces.append(chunk.text)
                    write(printable(chunk.text))
        except ApiError:
            self.messages.pop()
            raise
        except KeyboardInterrupt:
            write(" …")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return stream

    def _recipe(self) -> Recipe:
        """That of the model, as it was when it was first used."""
        if self.model not in self.recipes:
            self.recipes[self.model] = self.client.show_model(self.model).recipe or Recipe()
        return self.recipes[self.model]


def write(text: str) -> None:
    """Write to standard output unbuffered: tokens appear as they arrive."""
    sys.stdout.write(text)
    sys.stdout.flush()


def interact(conversation: Conversation, terminal: Console) -> None:
    """Read messages until the end of input. An API error is shown and the conversation goes on."""
    terminal.print(f"[bold]{conversation.model}[/bold] [dim]{HELP}[/dim]")
    while True:
        try:
            line = terminal.input("[bold cyan]you[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            terminal.print()
            return
        if line.startswith("/"):
            _command(conversation, terminal, line)
        elif line:
            _turn(conversation, terminal, line)


def _turn(conversation: Conversation, terminal: Console, line: str) -> None:
    try:
        stream = conversation.send(line, write)
    except ApiError as error:
        terminal.print(f"[red]{error.status}[/red] ", end="")
        terminal.print(printable(str(error)), markup=False)
        return
    reference = stream.prefix.reference if stream.prefix else "bare base"
    terminal.print()
    terminal.print(f"[dim]{reference}[/dim]", highlight=False)
    for warning in stream.warnings:
        terminal.print(f"[yellow]{escape(printable(warning))}[/yellow]", highlight=False)


def _command(conversation: Conversation, terminal: Console, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/model" and argument.strip():
        conversation.model = argument.strip()
    elif name == "/new":
        conversation.clear()
    else:
        terminal.print(f"[dim]{HELP}[/dim]")
        return
    terminal.print(f"[dim]{conversation.model}, {len(conversation.messages)} messages[/dim]")
