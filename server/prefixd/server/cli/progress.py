"""A bar on a terminal while files are uploaded or a batch runs; nothing elsewhere, as in logs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from prefixd.client.wire import Progress


@contextmanager
def upload_bar(console: Console | None = None) -> Iterator[Progress | None]:
    """What to call with the bytes sent and their total: None without a terminal. The bar is on
    standard error, and is removed at the end."""
    console = console or Console(stderr=True)
    if not console.file.isatty():  # rich takes FORCE_COLOR for a terminal
        yield None
        return
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda sent, total: bar.update(task, completed=sent, total=total)


@contextmanager
def line_bar(console: Console | None = None) -> Iterator[Callable[[str, int, int], object]]:
    """What to call with a status, the lines that are done, and their total. Without a terminal it
    shows nothing."""
    console = console or Console(stderr=True)
    if not console.file.isatty():
        yield lambda *_: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("validating", total=None)
        yield lambda status, done, total: bar.update(
            task, description=status, completed=done, total=total or None
        )
