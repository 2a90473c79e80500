"""Command-line options made from the settings: one description for flag, variable and help."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from prefixd.server.errors import PrefixdError
from prefixd.server.serve.settings import ENV_PREFIX, Settings
from prefixd.store.errors import StoreError

if TYPE_CHECKING:
    from prefixd.server.serve.catalog import CatalogParts

CATALOG_FLAGS = ("data_dir", "database_url", "blobs_url")
"""Settings of a command that needs the catalog and no model."""

JsonFlag = Annotated[bool, typer.Option("--json", envvar="PREFIXD_JSON", help="Print JSON.")]

# Every option is text to typer; the settings judge it, in one place for flag and variable.
_KINDS: dict[Any, str] = {int: "<int>", int | None: "<int>", float: "<float>", bool: "true|false"}


def fail(message: str) -> NoReturn:
    """End the command with a sentence on standard error and status 1."""
    typer.echo(f"prefixd: {message}", err=True)
    raise typer.Exit(1)


@contextmanager
def refusals() -> Iterator[None]:
    """End the command with the sentence of what was refused, or of what is not there."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (PrefixdError, StoreError, OSError, ValueError) as error:
        fail(str(error))
    except SQLAlchemyError as error:
        fail(f"the database cannot be used: {str(error).partition(chr(10))[0]}")


@contextmanager
def opened_catalog(settings: Settings) -> Iterator["CatalogParts"]:
    """The configured catalog, without a model; refusals end the command with their sentence."""
    from prefixd.server.serve.catalog import open_catalog

    with refusals():
        catalog = open_catalog(settings)
        try:
            yield catalog
        finally:
            catalog.database.dispose()


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, with times as ISO 8601."""
    typer.echo(json.dumps(value, indent=2, default=_plain))


def _plain(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    """An option for one field of the settings; its help names the variable and the default."""
    default = "" if field.default is None else str(field.default)
    words = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=f"{ENV_PREFIX}{name.upper()}",
        help=field.description,
        show_default=default or False,
        metavar="|".join(words) or _KINDS.get(field.annotation),
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=Annotated[str | None, option])


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these settings (none named: all) as one ``settings``."""
    chosen = names or tuple(Settings.model_fields)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in chosen}
            command(settings=_settings(given), **values)

        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]
        flags = [_flag(name, Settings.model_fields[name]) for name in chosen]
        # Typer reads the signature; keyword-only keeps the order of required and optional free.
        named = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*named, *flags])  # type: ignore[attr-defined]  # any function takes it
        run.__doc__ = command.__doc__
        run.__name__ = command.__name__
        return run

    return decorate


def _settings(given: dict[str, str | None]) -> Settings:
    set_ones: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**set_ones)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0])
        flag, variable = name.replace("_", "-"), f"{ENV_PREFIX}{name.upper()}"
        fail(f"--{flag} ({variable}): {first['msg']}")
