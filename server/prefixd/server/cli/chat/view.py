"""Answers on a terminal while they grow.

A terminal cannot redraw what has left its screen. So the part that is redrawn (``rich.live``) is
never higher than the screen, and everything else is printed once, where it stays:

    one answer     complete blocks are printed; the last lines of the growing one are redrawn
    two answers    their last lines are redrawn; both are printed in full at the end
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from prefixd.client.errors import ApiError
from prefixd.server.cli.chat.conversation import Answer
from prefixd.server.cli.chat.markdown import Printable, complete_blocks, markdown
from prefixd.server.cli.output import printable

MIN_COLUMN = 36
"""Narrower than this, two answers stand one below the other."""


class View(Protocol):
    """Shows answers while the block lasts; ``draw`` shows what has come since."""

    def draw(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class _Redrawn:
    """The part that is redrawn; removed at the end, when the rest is printed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @property
    def height(self) -> int:
        """Lines of the screen that may be redrawn."""
        return max(1, self.console.height - 2)

    def draw(self) -> None:
        """Print what is complete and redraw the rest."""
        self._live.update(self._growing(), refresh=True)

    def _growing(self) -> RenderableType:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._live.start()
        self.draw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.update("")
        self._live.stop()
        self._finish()


class SingleView(_Redrawn):
    """One answer: its reasoning dimmed, then its text as Markdown."""

    def __init__(self, console: Console, answer: Answer) -> None:
        super().__init__(console)
        self._answer = answer
        self._reasoning_printed = 0
        self._text_printed = 0
        self._has_printed = False

    def draw(self) -> None:
        reasoning, text = self._rest()
        if text:
            self._print_reasoning(reasoning)
        else:
            self._print_reasoning(reasoning[: reasoning.rfind("\n") + 1])
        self._print_text(text[: complete_blocks(text)])
        super().draw()

    def _rest(self) -> tuple[str, str]:
        """Reasoning and text that were not printed yet."""
        reasoning = printable(self._answer.reasoning)[self._reasoning_printed :]
        return reasoning, printable(self._answer.text)[self._text_printed :]

    def _print_reasoning(self, part: str) -> None:
        self._reasoning_printed += len(part)
        if part.strip():
            self.console.print(_dimmed(part))
            self._has_printed = True

    def _print_text(self, part: str) -> None:
        self._text_printed += len(part)
        if part.strip():
            if self._has_printed:
                self.console.print()
            self.console.print(Printable(markdown(part)))
            self._has_printed = True

    def _growing(self) -> RenderableType:
        reasoning, text = self._rest()
        parts: list[RenderableType] = []
        if reasoning.strip():
            parts.append(_dimmed(reasoning))
        if text.strip():
            parts += [Text(), Printable(markdown(text))] if self._has_printed else [markdown(text)]
        if not parts and not self._has_printed:
            parts.append(Text("…", style="dim"))
        return Printable(Group(*parts), self.height)

    def _finish(self) -> None:
        reasoning, text = self._rest()
        self._print_reasoning(reasoning)
        self._print_text(text)


class ComparedView(_Redrawn):
    """Several answers, each under the name of its model: side by side where the terminal is wide
    enough."""

    def __init__(self, console: Console, answers: Sequence[Answer]) -> None:
        super().__init__(console)
        self._answers = answers

    def _growing(self) -> RenderableType:
        each = self.height - 1 if self._is_wide else self.height // len(self._answers) - 1
        return self._layout(max(1, each))

    def _finish(self) -> None:
        self.console.print(self._layout(None))

    @property
    def _is_wide(self) -> bool:
        return self.console.width >= MIN_COLUMN * len(self._answers)

    def _layout(self, height: int | None) -> RenderableType:
        """All answers; with ``height``, the last lines of each."""
        bodies = [Printable(_body(answer), height) for answer in self._answers]
        if not self._is_wide:
            titled = zip(self._answers, bodies, strict=True)
            return Group(*(part for one, body in titled for part in (Rule(_title(one)), body)))
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for answer in self._answers:
            table.add_column(_title(answer), ratio=1, overflow="fold")
        table.add_row(*bodies)
        return table


def _title(answer: Answer) -> Text:
    return Text(printable(answer.model), style="bold cyan")


def _body(answer: Answer) -> RenderableType:
    reasoning, text = printable(answer.reasoning), printable(answer.text)
    parts: list[RenderableType] = []
    if reasoning.strip():
        parts += [_dimmed(reasoning), Text()]
    parts.append(markdown(text) if text else Text("…", style="dim"))
    return Group(*parts, *notes(answer, with_prefix=False))


def _dimmed(text: str) -> Text:
    return Text(text.removesuffix("\n"), style="dim")


def notes(answer: Answer, *, with_prefix: bool = True) -> list[Text]:
    """The lines below an answer: which version gave it, what cut it, what the server warns of."""
    lines = [Text(one_line(warning), style="yellow dim") for warning in answer.warnings]
    if answer.error is not None:
        return [*lines, error_line(answer.error)]
    used = answer.prefix.reference if answer.prefix else "bare base"
    chosen = answer.prefix.chosen_by if answer.prefix else None
    parts = [f"{used}, chosen by {chosen}" if chosen in {"user", "default"} else used]
    if not with_prefix:
        parts = []
    if answer.finish_reason == "length":
        parts.append("cut at the most tokens of an answer (--max-tokens)")
    return [*lines, Text(printable(", ".join(parts)), style="dim")] if parts else lines


def error_line(error: Exception) -> Text:
    """An error in one line, with its status if it is the server's."""
    status = f"{error.status} " if isinstance(error, ApiError) else ""
    return Text.assemble((status, "red"), one_line(str(error)) or type(error).__name__)


def one_line(text: str) -> str:
    """``text`` without control characters and line breaks."""
    return " ".join(printable(text).split())
