"""A bar on a terminal while files are uploaded; nothing elsewhere, such as in logs."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
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
