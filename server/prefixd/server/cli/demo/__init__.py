"""``prefixd demo``: the whole product on a real model, in one command."""

import signal
from pathlib import Path
from typing import Annotated

import typer

from prefixd.server.cli.output import client_errors, console


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the proof.")] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            help="Port to serve on. Default: 8000, or a free one if that is taken.",
            min=0,
            max=65535,
        ),
    ] = None,
    data_dir: Annotated[Path, typer.Option("--data-dir", help="The demo's own data.")] = Path(
        ".prefixd/demo"
    ),
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples", help="Folder with prefixes.json. Default: the examples of this package."
        ),
    ] = None,
) -> None:
    """Serve the demo model, mix the example prefixes in one batch, prove it, keep serving."""
    from prefixd.server.cli.demo.run import run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the child ends too
    try:
        with client_errors():
            run(console(), examples=examples, data_dir=data_dir, port=port, once=once)
    except KeyboardInterrupt:
        raise typer.Exit(130 if once else 0) from None
