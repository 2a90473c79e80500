"""The command-line verbs that talk to a server.

Every flag has an environment variable. Results go to standard output, errors to standard error
with exit code 1.
"""

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from prefixd.client.protocol import Sampling
from prefixd.client.sync import Client
from prefixd.client.types import Prefix, Uploaded
from prefixd.server.cli import chat as conversation
from prefixd.server.cli import output as terminal
from prefixd.server.cli import residency as cli_residency
from prefixd.server.cli.chat import Conversation
from prefixd.server.cli.output import JsonOption, connected, verb

NameArgument = Annotated[str, typer.Argument(help="The prefix.", show_default=False)]
prefix_app = typer.Typer(help="Prefixes of your tenant, on a running server.", no_args_is_help=True)
cli_residency.mount(prefix_app)


def _metadata(text: str | None, task_id: int | None) -> dict[str, object] | None:
    metadata: dict[str, object] = {}
    if text is not None:
        try:
            given = json.loads(text)
        except ValueError as error:
            raise typer.BadParameter(f"expected JSON: {error}", param_hint="--metadata") from None
        if not isinstance(given, dict):
            raise typer.BadParameter("expected a JSON object", param_hint="--metadata")
        metadata.update(given)
    if task_id is not None:
        metadata["task_id"] = task_id
    return metadata or None


def _upload(
    client: Client,
    name: str,
    *,
    source: Path | None,
    text: str | None,
    metadata: Mapping[str, object] | None,
    warm: bool,
) -> Uploaded:
    if (source is None) == (text is None):
        raise typer.BadParameter("give either a SOURCE or --text")
    if text is not None:
        return client.upload_text(name, text, metadata=metadata, warm=warm)
    assert source is not None
    if source.is_dir():
        return client.upload_folder(name, source, metadata=metadata, warm=warm)
    return client.upload_text(name, terminal.read_text(source), metadata=metadata, warm=warm)


@prefix_app.command("push")
@connected
def push(
    client: Client,
    *,
    name: NameArgument,
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A folder that PEFT's save_pretrained wrote, or a text file (- is standard input)",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", envvar="PREFIXD_TEXT", help="The text of a hard prompt."),
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option("--metadata", envvar="PREFIXD_METADATA", help="A JSON object to keep."),
    ] = None,
    task_id: Annotated[
        int | None,
        typer.Option("--task-id", envvar="PREFIXD_TASK_ID", help="Task of a multi-task prefix."),
    ] = None,
    warm: Annotated[
        bool,
        typer.Option("--warm", envvar="PREFIXD_WARM", help="Make it resident at once."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Upload a prefix as a new version of NAME; the same bytes again change nothing."""
    details = _metadata(metadata, task_id)
    done = _upload(client, name, source=source, text=text, metadata=details, warm=warm)
    if as_json:
        terminal.print_json(done.prefix)
    else:
        state = "uploaded" if done.created else "already there"
        typer.echo(
            f"{done.prefix.reference}  {state}  {done.prefix.kind}, "
            f"{done.prefix.num_virtual_tokens} virtual tokens, {done.prefix.digest[:12]}"
        )


@prefix_app.command("ls")
@connected
def list_prefixes(
    client: Client,
    *,
    as_json: JsonOption = False,
) -> None:
    """List your prefixes, the latest version of each."""
    found: list[Prefix] = []
    page = client.list_prefixes()
    found.extend(page.prefixes)
    while page.next_after is not None:
        page = client.list_prefixes(after=page.next_after)
        found.extend(page.prefixes)
    _listing(found, as_json=as_json)


@prefix_app.command("versions")
@connected
def list_versions(
    client: Client,
    *,
    name: NameArgument,
    as_json: JsonOption = False,
) -> None:
    """List every version of a prefix."""
    page = client.list_versions(name)
    found = list(page.versions)
    while page.next_before is not None:
        page = client.list_versions(name, before=page.next_before)
        found.extend(page.versions)
    _listing(found, as_json=as_json)


def _listing(found: list[Prefix] | tuple[Prefix, ...], *, as_json: bool) -> None:
    if as_json:
        terminal.print_json(found)
        return
    rows = [
        (
            one.reference,
            one.kind,
            one.num_virtual_tokens,
            ",".join(one.aliases) or "-",
            one.digest[:12],
            f"{one.created_at:%Y-%m-%d %H:%M}",
        )
        for one in found
    ]
    terminal.print_columns(("PREFIX", "KIND", "TOKENS", "ALIASES", "DIGEST", "CREATED"), rows)


@prefix_app.command("show")
@connected
def show(
    client: Client,
    *,
    reference: Annotated[str, typer.Argument(help="NAME, NAME@3 or NAME@alias.")],
    as_json: JsonOption = False,
) -> None:
    """Show what the server knows of one version."""
    found = client.show_prefix(reference)
    if as_json:
        terminal.print_json(found)
        return
    for key, value in found.model_dump().items():
        shown = ", ".join(value) if isinstance(value, tuple) else value
        typer.echo(f"{key:<24} {terminal.printable(str(shown))}")


@prefix_app.command("rm")
@connected
def remove(
    client: Client,
    *,
    name: NameArgument,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", envvar="PREFIXD_YES", help="Do not ask.")
    ] = False,
) -> None:
    """Delete a prefix with all its versions and aliases. Asks first on a terminal."""
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Delete {name} with all its versions?", abort=True)
    client.delete_prefix(name)
    typer.echo(f"{name} deleted")


@prefix_app.command("alias")
@connected
def alias(
    client: Client,
    *,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="Such as prod.")],
    version: Annotated[int, typer.Argument(help="The version it shall mean.", min=1)],
) -> None:
    """Let NAME@ALIAS mean a version from the next request on."""
    client.set_alias(name, alias, version=version)
    typer.echo(f"{name}@{alias} is {name}@{version}")


@prefix_app.command("unalias")
@connected
def unalias(
    client: Client,
    *,
    name: NameArgument,
    alias: Annotated[str, typer.Argument(help="The alias to forget; its version stays.")],
) -> None:
    """Forget an alias."""
    client.remove_alias(name, alias)
    typer.echo(f"{name}@{alias} forgotten")


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
            envvar="PREFIXD_CHAT_MODEL",
            help="A prefix (NAME, NAME@3, NAME@alias) or the base. Default: the base.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", envvar="PREFIXD_CHAT_SYSTEM", help="A system message."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", envvar="PREFIXD_CHAT_MAX_TOKENS", min=1)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", envvar="PREFIXD_CHAT_TEMPERATURE", min=0.0)
    ] = 0.0,
) -> None:
    """Chat with the base or under a prefix, streaming."""
    piped = message is None and not sys.stdin.isatty()
    talk = Conversation(
        client=client,
        model=model or _base(client),
        sampling=Sampling(max_tokens=max_tokens, temperature=temperature),
        system=system,
    )
    if message is None and not piped:
        conversation.interact(talk, terminal.console())
        return
    words = sys.stdin.read().strip() if message is None else message
    if not words:
        raise typer.BadParameter("no message on standard input")
    talk.answer(words, conversation.say)
    conversation.say("\n")


def _base(client: Client) -> str:
    return next(model.id for model in client.list_models() if model.parent is None)


@verb
def demo(
    *,
    once: Annotated[
        bool,
        typer.Option("--once", envvar="PREFIXD_DEMO_ONCE", help="End after the proof."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            envvar="PREFIXD_DEMO_PORT",
            help="Port to serve on. Default: 8000, or a free one where that is taken.",
            min=0,
            max=65535,
        ),
    ] = None,
    data_dir: Annotated[
        Path,
        typer.Option("--data-dir", envvar="PREFIXD_DEMO_DIR", help="The demo's own data."),
    ] = Path(".prefixd/demo"),
    examples: Annotated[
        Path | None,
        typer.Option(
            "--examples",
            envvar="PREFIXD_DEMO_EXAMPLES",
            help="Folder with prefixes.json. Default: examples/ of the checkout.",
        ),
    ] = None,
) -> None:
    """Serve the demo model, mix the example prefixes in one batch, prove it, go on serving."""
    from prefixd.server.cli import demo as demonstration

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the child ends with us
    try:
        demonstration.run(
            terminal.console(), examples=examples, data_dir=data_dir, port=port, once=once
        )
    except KeyboardInterrupt:
        raise typer.Exit(130 if once else 0) from None
