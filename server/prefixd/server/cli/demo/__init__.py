"""``prefixd demo``: the whole product on a real model, in one command."""

import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefixd.client.sync import Client
from prefixd.server.cli.demo import show, traffic
from prefixd.server.cli.demo.child import DemoFailed, ServerProcess, admin
from prefixd.server.cli.demo.plan import FRIENDS, SUPPORT, Example, asks, metric, read_examples

TENANTS = (SUPPORT, FRIENDS)
MIN_REQUESTS = 16
# Converting the bundled model is the longest part, and a loaded machine is slow at it.
START_TIMEOUT_S = 600.0


def run(
    console: Console, *, examples: Path | None, data_dir: Path, port: int | None, once: bool
) -> None:
    """Run the demo; with ``once`` end after the proof, else serve until the server ends.

    Raises ``DemoFailed`` when something went wrong or no pass mixed two prefixes.
    """
    folder = traffic.example_folder(examples)
    if folder is None:
        raise DemoFailed("no examples/prefixes.json here: run from a checkout, or pass --examples")
    found = read_examples(folder)
    data_dir.mkdir(parents=True, exist_ok=True)
    keys = _tenants(console, data_dir)
    with ServerProcess(data_dir=data_dir, port=_port(port)) as server:
        _wait(console, server)
        _show(console, server.url, found, keys)
        if once:
            return
        first, second = _two_to_show(found)
        show.print_how_to_go_on(
            console, url=server.url, key=keys[first.tenant], example=first, other=second
        )
        console.print(f"\nServing on {server.url}; log in {server.log}. Ctrl-C ends it.")
        code = server.wait()
    raise DemoFailed(f"the server ended by itself with exit code {code}; its log is {server.log}")


def _tenants(console: Console, data_dir: Path) -> dict[str, str]:
    """A fresh key for each tenant; the tenants of an earlier run are kept."""
    with console.status("Creating two tenants, each with a key"):
        listed = admin(data_dir, "tenant", "ls")
        there = {entry["name"] for entry in listed} if isinstance(listed, list) else set()
        keys = {}
        for tenant in TENANTS:
            if tenant not in there:
                admin(data_dir, "tenant", "create", tenant)
            issued = admin(data_dir, "key", "create", "--tenant", tenant)
            if not isinstance(issued, dict):
                raise DemoFailed(f"`prefixd key create` printed {type(issued).__name__}, no object")
            keys[tenant] = str(issued["key"])
    console.print(f"[green]✓[/green] tenants {' and '.join(TENANTS)}, each with a key")
    return keys


def _port(given: int | None) -> int:
    """The port asked for; else 8000 where it is free, else any."""
    if given is not None:
        return given
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8000))
        except OSError:
            return 0
    return 8000


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _wait(console: Console, server: ServerProcess) -> None:
    started = time.monotonic()
    with _progress(console) as bar:
        words = "Loading SmolLM2-135M-Instruct"
        task = bar.add_task(words, total=None)
        server.wait_until_ready(
            timeout=START_TIMEOUT_S,
            say=lambda event: bar.update(task, description=f"{words}: {escape(event)}"),
        )
    console.print(
        f"[green]✓[/green] SmolLM2-135M-Instruct ready on {server.url} "
        f"after {time.monotonic() - started:.0f} s"
    )


def _show(console: Console, url: str, examples: Sequence[Example], keys: Mapping[str, str]) -> None:
    clients = {tenant: Client(url, api_key=key) for tenant, key in keys.items()}
    try:
        _upload(console, examples, clients)
        _check_isolation(console, examples, clients)
        anyone = clients[TENANTS[0]]
        base = next(model.id for model in anyone.list_models() if model.parent is None)
        before = metric(anyone.metrics(), "prefixd_steps_total")
        seconds, count = _ask(console, url, examples, keys=keys, base=base)
        page = anyone.metrics()
    finally:
        for client in clients.values():
            client.close()
    proof = show.Proof(
        requests=count,
        passes=round(metric(page, "prefixd_steps_total") - before),
        distinct_prefixes=round(metric(page, "prefixd_distinct_prefixes_per_step_max")),
        seconds=seconds,
    )
    show.print_proof(console, proof)
    if not proof.holds:
        raise DemoFailed("no forward pass carried two prefixes")


def _upload(console: Console, examples: Sequence[Example], clients: Mapping[str, Client]) -> None:
    for example in examples:
        client = clients[example.tenant]
        prefix = traffic.upload_example(client, example)
        first = traffic.first_use(client, example)
        show.print_uploaded(console, example, prefix, first_use_s=first)


def _check_isolation(
    console: Console, examples: Sequence[Example], clients: Mapping[str, Client]
) -> None:
    for example in examples:
        for tenant, client in clients.items():
            if tenant != example.tenant and not traffic.is_hidden(client, example.name):
                raise DemoFailed(f"{tenant} can see {example.name} of {example.tenant}")
    console.print("[green]✓[/green] neither tenant can see the other's prefixes (404)")


def _ask(
    console: Console,
    url: str,
    examples: Sequence[Example],
    *,
    keys: Mapping[str, str],
    base: str,
) -> tuple[float, int]:
    requests = asks(examples)
    if len(requests) < MIN_REQUESTS:
        raise DemoFailed(f"the examples give {len(requests)} requests, expected {MIN_REQUESTS}")
    started = time.monotonic()
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(f"{len(requests)} requests at once", total=len(requests))
        answers = traffic.ask_all(
            url, requests, keys=keys, base=base, on_done=lambda: bar.advance(task)
        )
    seconds = time.monotonic() - started
    console.print(show.answers_table(requests, answers))
    return seconds, len(requests)


def _two_to_show(examples: Sequence[Example]) -> tuple[Example, Example]:
    """One example to generate with, and one with PEFT files to upload."""
    return examples[0], next(example for example in examples if example.text is None)


__all__ = ["DemoFailed", "run"]
