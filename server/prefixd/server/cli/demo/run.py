"""The steps of the demo: tenants, a server, uploads, concurrent requests, the proof."""

import socket
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefixd.client.sync import Client
from prefixd.server.cli.demo import show, traffic
from prefixd.server.cli.demo.child import DemoFailed, ServerProcess, admin
from prefixd.server.cli.demo.plan import (
    FRIENDS,
    SUPPORT,
    Example,
    metric,
    plan_requests,
    read_examples,
)
from prefixd.server.cli.options import demo_model_packages

TENANTS = (SUPPORT, FRIENDS)
MIN_REQUESTS = 16
# Converting the bundled model is the longest part, and a loaded machine is slow at it.
START_TIMEOUT_S = 600.0


def run(
    console: Console, *, examples: Path | None, data_dir: Path, port: int | None, once: bool
) -> None:
    """Run the demo; with ``once`` end after the proof, else serve until the server ends.

    Raises ``DemoFailed`` when a step failed or no pass mixed two prefixes, ModuleNotFoundError
    without the extra ``serve``.
    """
    _check_packages()
    listing = read_examples(example_folder(examples))
    data_dir.mkdir(parents=True, exist_ok=True)
    keys = _create_tenants(console, data_dir)
    with ServerProcess(data_dir=data_dir, port=_port(port)) as server:
        _wait(console, server)
        _prove(console, server.url, listing, keys)
        if once:
            return
        trained = next(example for example in listing if example.text_file is None)
        show.print_next_steps(
            console, url=server.url, key=keys[listing[0].tenant], model=listing[0], upload=trained
        )
        console.print(f"\nServing on {server.url}; log in {server.log}. Ctrl-C ends it.")
        code = server.wait()
    raise DemoFailed(f"the server ended by itself with exit code {code}; its log is {server.log}")


def _check_packages() -> None:
    for module in ("sqlalchemy", "torch"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    try:
        demo_model_packages()
    except LookupError as error:
        raise DemoFailed(str(error)) from None


def example_folder(option: Path | None) -> Path:
    """The folder with ``prefixes.json``: ``option``, else that of the installed package, else that
    of the checkout. Raises ``DemoFailed`` when it does not exist."""
    here = Path(__file__)
    candidates = [option] if option else [here.parent / "examples", here.parents[5] / "examples"]
    for folder in candidates:
        if (folder / "prefixes.json").is_file():
            return folder
    raise DemoFailed(f"{candidates[-1] / 'prefixes.json'} does not exist: pass --examples")


def _create_tenants(console: Console, data_dir: Path) -> dict[str, str]:
    """A new key for each tenant; the tenants of an earlier run are kept."""
    with console.status("Creating two tenants, each with a key"):
        listed = admin(data_dir, "tenant", "ls")
        existing = {entry["name"] for entry in listed} if isinstance(listed, list) else set()
        keys = {}
        for tenant in TENANTS:
            if tenant not in existing:
                admin(data_dir, "tenant", "create", tenant)
            issued = admin(data_dir, "key", "create", "--tenant", tenant)
            if not isinstance(issued, dict):
                raise DemoFailed(
                    f"`prefixd key create` printed {type(issued).__name__}, not an object"
                )
            keys[tenant] = str(issued["key"])
    console.print(f"[green]✓[/green] tenants {' and '.join(TENANTS)}, each with a key")
    return keys


def _port(option: int | None) -> int:
    """``option``, else 8000, or 0 (any free port) if 8000 is taken."""
    if option is not None:
        return option
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
        label = "Loading SmolLM2-135M-Instruct"
        task = bar.add_task(label, total=None)
        server.wait_until_ready(
            timeout=START_TIMEOUT_S,
            on_event=lambda event: bar.update(task, description=f"{label}: {escape(event)}"),
        )
    console.print(
        f"[green]✓[/green] SmolLM2-135M-Instruct ready on {server.url} "
        f"after {time.monotonic() - started:.0f} s"
    )


def _prove(
    console: Console, url: str, examples: Sequence[Example], keys: Mapping[str, str]
) -> None:
    clients = {tenant: Client(url, api_key=key) for tenant, key in keys.items()}
    try:
        _upload(console, examples, clients)
        _check_isolation(console, examples, clients)
        client = clients[TENANTS[0]]
        base = next(model.id for model in client.list_models() if model.parent is None)
        before = metric(client.metrics(), "prefixd_steps_total")
        seconds, count = _send_requests(console, url, examples, keys=keys, base=base)
        page = client.metrics()
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
        first_use_s = traffic.first_use(client, example)
        show.print_uploaded(console, example, prefix, first_use_s=first_use_s)


def _check_isolation(
    console: Console, examples: Sequence[Example], clients: Mapping[str, Client]
) -> None:
    for example in examples:
        for tenant, client in clients.items():
            if tenant != example.tenant and not traffic.is_hidden(client, example.name):
                raise DemoFailed(f"{tenant} can see {example.name} of {example.tenant}")
    console.print("[green]✓[/green] neither tenant can see the other's prefixes (404)")


def _send_requests(
    console: Console,
    url: str,
    examples: Sequence[Example],
    *,
    keys: Mapping[str, str],
    base: str,
) -> tuple[float, int]:
    requests = plan_requests(examples)
    if len(requests) < MIN_REQUESTS:
        raise DemoFailed(f"the examples give {len(requests)} requests, expected {MIN_REQUESTS}")
    started = time.monotonic()
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(f"{len(requests)} requests at once", total=len(requests))
        answers = traffic.send_all(
            url, requests, keys=keys, base=base, on_answer=lambda: bar.advance(task)
        )
    seconds = time.monotonic() - started
    console.print(show.answers_table(requests, answers))
    return seconds, len(requests)
