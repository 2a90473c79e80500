"""``prefixd prefix``: the prefixes of a tenant, on a running server."""

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from prefixd.client.convert.sources import Source, read_source
from prefixd.client.errors import FormatError
from prefixd.client.folders import CompositionContent, TextContent, decode_text
from prefixd.client.sync import Client
from prefixd.client.types import Member, Prefix
from prefixd.server.cli.aliases import (
    NameArgument,
    ReferenceArgument,
    alias,
    pin,
    unalias,
    unpin,
    warm,
)
from prefixd.server.cli.compositions import Combine, composition
from prefixd.server.cli.diff import diff
from prefixd.server.cli.inputs import argument_text, json_object
from prefixd.server.cli.options import JsonFlag, VerbGroup, connected
from prefixd.server.cli.output import (
    as_dict,
    print_columns,
    print_fields,
    print_json,
    printable,
)
from prefixd.server.cli.progress import upload_bar
from prefixd.server.cli.pull import pull
from prefixd.server.cli.recipe import recipe
from prefixd.server.cli.rollback import rollback


class Bases(StrEnum):
    """Which versions are listed."""

    SERVED = "served"
    ALL = "all"

    @property
    def requested(self) -> Literal["all"] | None:
        """The value of the query parameter; None for the default."""
        return "all" if self is Bases.ALL else None


class TextRole(StrEnum):
    """Where a text stands."""

    RAW = "raw"
    SYSTEM = "system"


BasesOption = Annotated[
    Bases,
    typer.Option("--base", help="Versions for the base that is served, or for all bases."),
]

prefix_app = typer.Typer(
    cls=VerbGroup, help="Prefixes of your tenant, on a running server.", no_args_is_help=True
)


@prefix_app.command("push")
@connected
def push(
    client: Client,
    *,
    name: NameArgument,
    source: Annotated[
        str | None,
        typer.Argument(
            help="A folder that PEFT's save_pretrained or `prefix pull` wrote, a text file (- is "
            "standard input), a file of another tool (docs/formats.md), or ORG/NAME on the Hub.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The text of a hard prompt.")] = None,
    metadata: Annotated[
        str | None,
        typer.Option("--metadata", help="A JSON object; replaces the metadata of prefixd.json."),
    ] = None,
    task_id: Annotated[
        int | None, typer.Option("--task-id", help="Task of a multi-task prefix or table.")
    ] = None,
    role: Annotated[
        TextRole | None,
        typer.Option("--role", help="Of a text: before prompts, or the system turn of chats."),
    ] = None,
    stack: Annotated[
        str | None,
        typer.Option("--stack", help="A@1,B@prod: virtual tokens of prefixes, one after another."),
    ] = None,
    blend: Annotated[
        str | None,
        typer.Option("--blend", help="A=0.7,B=0.3: the weighted mean of soft prompts."),
    ] = None,
    ensemble: Annotated[
        str | None,
        typer.Option("--ensemble", help="A,B,C: prefixes whose predictions are combined."),
    ] = None,
    combine: Annotated[
        Combine | None, typer.Option("--combine", help="How an ensemble combines them.")
    ] = None,
    warm: Annotated[bool, typer.Option("--warm", help="Make it resident at once.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Upload a prefix as a new version of NAME; the same bytes again make none."""
    composed = composition(stack=stack, blend=blend, ensemble=ensemble, combine=combine)
    if composed is None:
        prefix = _prefix(source, text, task_id=task_id)
    elif source is None and text is None:
        prefix = Source(CompositionContent(composed), task_id=task_id)
    else:
        raise typer.BadParameter("expected one of a SOURCE, --text and a composition")
    for note in prefix.notes:
        typer.echo(f"prefixd: {printable(note)}", err=True)
    fields = None if metadata is None else json_object(metadata, hint="--metadata")
    content = prefix.content
    if role is not None:
        if not isinstance(content, TextContent):
            raise typer.BadParameter("only a text has a role", param_hint="--role")
        content = replace(content, role=str(role))
    with upload_bar() as progress:
        upload = client.upload_content(
            name, content, metadata=fields, task_id=prefix.task_id, warm=warm, progress=progress
        )
    for warning in upload.warnings:
        typer.echo(f"prefixd: {printable(warning)}", err=True)
    if as_json:
        print_json(upload.prefix)
    else:
        state = "uploaded" if upload.created else "already there"
        typer.echo(
            f"{upload.prefix.reference}  {state}  {upload.prefix.kind}, "
            f"{upload.prefix.num_virtual_tokens} virtual tokens, {upload.prefix.digest[:12]}"
        )


def _prefix(source: str | None, text: str | None, *, task_id: int | None) -> Source:
    """What to upload: ``text``, what ``source`` holds, or standard input when it is -."""
    if (source is None) == (text is None):
        raise typer.BadParameter("expected a SOURCE, --text, --stack, --blend or --ensemble")
    if text is not None:
        return Source(TextContent(argument_text(text, name="--text")), task_id=task_id)
    assert source is not None
    if source != "-" and (prefix := read_source(source, task_id=task_id)):
        return prefix
    data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    try:
        return Source(TextContent(decode_text(data, source=source)), task_id=task_id)
    except FormatError as error:
        raise typer.BadParameter(
            f"{error}; to upload a prefix that PEFT wrote, push its folder", param_hint="SOURCE"
        ) from None


prefix_app.command("pull")(connected(pull))
prefix_app.command("diff")(connected(diff, error_status=2))


@prefix_app.command("ls")
@connected
def list_prefixes(
    client: Client,
    *,
    base: BasesOption = Bases.SERVED,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:VALUE: only prefixes with this label; repeat it to require several."
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """List your prefixes, the latest version of each."""
    labels = _labels(label or [])
    page = client.list_prefixes(base=base.requested, labels=labels)
    prefixes = list(page.prefixes)
    while page.next_after is not None:
        page = client.list_prefixes(base=base.requested, labels=labels, after=page.next_after)
        prefixes.extend(page.prefixes)
    _print_prefixes(prefixes, as_json=as_json)


def _labels(texts: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or name in labels:
            raise typer.BadParameter(
                f"expected NAME:VALUE, each name once; got {printable(text)!r}",
                param_hint="--label",
            )
        labels[name] = value
    return labels


@prefix_app.command("versions")
@connected
def list_versions(
    client: Client,
    *,
    name: NameArgument,
    base: BasesOption = Bases.SERVED,
    as_json: JsonFlag = False,
) -> None:
    """List every version of a prefix."""
    page = client.list_versions(name, base=base.requested)
    versions = list(page.versions)
    while page.next_before is not None:
        page = client.list_versions(name, base=base.requested, before=page.next_before)
        versions.extend(page.versions)
    _print_prefixes(versions, as_json=as_json)


def _print_prefixes(prefixes: list[Prefix], *, as_json: bool) -> None:
    if as_json:
        print_json(prefixes)
        return
    rows = [
        (
            prefix.reference,
            prefix.kind,
            prefix.num_virtual_tokens,
            prefix.base or "-",
            ",".join(prefix.aliases) or "-",
            _label_text(prefix) or "-",
            prefix.digest[:12],
            f"{prefix.created_at:%Y-%m-%d %H:%M}",
        )
        for prefix in prefixes
    ]
    titles = ("PREFIX", "KIND", "TOKENS", "BASE", "ALIASES", "LABELS", "DIGEST", "CREATED")
    print_columns(titles, rows)


@prefix_app.command("show")
@connected
def show(client: Client, *, reference: ReferenceArgument, as_json: JsonFlag = False) -> None:
    """Show the manifest of one version."""
    prefix = client.show_prefix(reference)
    if as_json:
        print_json(prefix)
        return
    written = {"labels": _label_text(prefix), "members": tuple(map(_member_text, prefix.members))}
    print_fields(
        {
            name: ", ".join(value) if isinstance(value, tuple) else value
            for name, value in (as_dict(prefix) | written).items()
        }
    )


def _member_text(member: Member) -> str:
    agreement, weight = member.agreement, member.weight
    if agreement is not None:
        return f"{member.reference} (agreed {agreement.agreed} of {agreement.compared})"
    return member.reference if weight is None else f"{member.reference} ({weight:g})"


def _label_text(prefix: Prefix) -> str:
    return ",".join(f"{name}:{value}" for name, value in sorted(prefix.labels.items()))


@prefix_app.command("metadata")
@connected
def metadata(
    client: Client,
    *,
    reference: ReferenceArgument,
    patch: Annotated[
        str, typer.Argument(help="A JSON object to merge into it; null removes a field.")
    ],
    as_json: JsonFlag = False,
) -> None:
    """Change the metadata of one version."""
    name, _, version = reference.partition("@")
    fields = json_object(patch, hint="PATCH")
    prefix = client.patch_metadata(name, fields, version=version or "latest")
    if as_json:
        print_json(prefix)
    else:
        typer.echo(f"{prefix.reference}  metadata changed")


@prefix_app.command("rm")
@connected
def remove(
    client: Client,
    *,
    reference: Annotated[
        str,
        typer.Argument(metavar="NAME", help="The prefix, or NAME@3 for one version of it."),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a prefix with all its versions and aliases, or one version. Asks first on a
    terminal."""
    name, at, version = reference.partition("@")
    if at and not (version.isascii() and version.isdigit()):
        raise typer.BadParameter(
            f"expected a prefix or one version of it, as NAME@3; received {reference!a} (unalias "
            "removes an alias)",
            param_hint="NAME",
        )
    if not yes and sys.stdin.isatty():
        what = reference if at else f"{name} with all its versions"
        typer.confirm(f"Delete {what}?", abort=True)
    if at:
        client.delete_version(name, int(version))
    else:
        client.delete_prefix(name)
    typer.echo(f"{reference} deleted")


for verb in (recipe, rollback, alias, unalias, warm, pin, unpin):
    prefix_app.command(verb.__name__)(connected(verb))
