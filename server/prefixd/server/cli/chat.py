"""``prefixd chat``: one answer, or a conversation in the terminal."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console

from prefixd.client.errors import ApiError
from prefixd.client.protocol import Sampling
from prefixd.client.sync import Client, Stream
from prefixd.server.cli.output import printable

HELP = "/model REF changes the prefix, /new forgets the conversation, Ctrl-D ends."


@dataclass
class Conversation:
    """The messages so far, and the model they go to."""

    client: Client
    model: str
    sampling: Sampling
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over, with the system message alone."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, message: str, write: Callable[[str], None]) -> Stream:
        """Send ``message`` and hand each piece of the answer to ``write``.

        A refusal takes the message back, so that the conversation can go on. So does Ctrl-C,
        but with what came until then kept as the answer.
        """
        self.messages.append({"role": "user", "content": message})
        pieces: list[str] = []
        stream = self.client.stream_chat(self.messages, model=self.model, **self.sampling)
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


def say(text: str) -> None:
    """Write to standard output at once: tokens appear as they come."""
    sys.stdout.write(text)
    sys.stdout.flush()


def interact(conversation: Conversation, console: Console) -> None:
    """Read messages until the end of input. Refusals are shown and the conversation goes on."""
    console.print(f"[bold]{conversation.model}[/bold] [dim]{HELP}[/dim]")
    while True:
        try:
            line = console.input("[bold cyan]you[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line.startswith("/"):
            _command(conversation, console, line)
        elif line:
            _turn(conversation, console, line)


def _turn(conversation: Conversation, console: Console, line: str) -> None:
    try:
        stream = conversation.answer(line, say)
    except ApiError as error:
        console.print(f"[red]{error.status}[/red] ", end="")
        console.print(printable(str(error)), markup=False)
        return
    used = stream.prefix.reference if stream.prefix else "bare base"
    console.print()
    console.print(f"[dim]{used}[/dim]", highlight=False)


def _command(conversation: Conversation, console: Console, line: str) -> None:
    word, _, rest = line.partition(" ")
    if word == "/model" and rest.strip():
        conversation.model = rest.strip()
    elif word == "/new":
        conversation.forget()
    else:
        console.print(f"[dim]{HELP}[/dim]")
        return
    console.print(f"[dim]{conversation.model}, {len(conversation.messages)} messages[/dim]")
