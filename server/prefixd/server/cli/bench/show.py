"""Runs a measurement in the terminal and writes its results; Ctrl-C keeps what was measured."""

import asyncio
import sys
from pathlib import Path

import typer

from prefixd.client.errors import ConnectError, NotFoundError
from prefixd.server.cli.bench.generation import Generation
from prefixd.server.cli.bench.levels import Level
from prefixd.server.cli.bench.report import TITLES, notes, report, table
from prefixd.server.cli.bench.run import Measurement, measure
from prefixd.server.cli.output import client_errors, fail, json_text, print_columns, printable


def run_and_show(
    measurement: Measurement, *, json_file: Path | None, plot_file: Path | None
) -> None:
    """Measure; print a table and notes; write the files. Ends the verb with status 1 where no
    request succeeded, 130 after Ctrl-C."""
    with client_errors():
        try:
            asyncio.run(_measured(measurement))
        except ConnectError as error:
            fail(f"{error}: is the server running?")
        except NotFoundError as error:
            fail(f"{error}{_endpoint_hint(measurement, error)}")
        except KeyboardInterrupt:
            measurement.interrupted = True
        summaries = measurement.summaries()
        if summaries:
            print_columns(TITLES, table(summaries))
            for line in notes(measurement, summaries):
                typer.echo(printable(line))
            if json_file is not None:
                text = json_text(report(measurement, summaries), indent=2)
                json_file.write_text(f"{text}\n", encoding="utf-8")
            if plot_file is not None:
                from prefixd.server.cli.bench.plot import plot

                plot(
                    plot_file, summaries, title=f"{measurement.models[0]} at {measurement.plan.url}"
                )
    if measurement.interrupted:
        raise typer.Exit(130)
    if not any(row["completed"] for row in summaries):
        raise typer.Exit(1)


async def _measured(measurement: Measurement) -> None:
    progress = _Progress()
    try:
        await measure(measurement, on_level=progress.begin, on_result=progress.count)
    finally:
        progress.end()


def _endpoint_hint(measurement: Measurement, error: NotFoundError) -> str:
    """A 404 without a code is of the path, not of the model."""
    other = "chat" if measurement.plan.endpoint == "completions" else "completions"
    return "" if error.code or error.type else f" (try --endpoint {other})"


class _Progress:
    """A line on a terminal's standard error that counts the requests of the running level."""

    def __init__(self) -> None:
        self._is_shown = sys.stderr.isatty()
        self._level: Level | None = None

    def begin(self, level: Level) -> None:
        self._level = level

    def count(self, _: Generation) -> None:
        if self._is_shown and self._level is not None:
            counts = f"{len(self._level.results)} of {self._level.num_requests}"
            sys.stderr.write(f"\r{self._level.load}: {counts}\x1b[K")

    def end(self) -> None:
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
