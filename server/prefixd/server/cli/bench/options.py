"""The options of ``prefixd bench``, and the parsing of those that are more than a number.

A wrong value raises typer.BadParameter, which ends the verb with status 2.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from prefixd.server.cli.bench.generation import Endpoint
from prefixd.server.cli.bench.levels import Load
from prefixd.server.cli.bench.summary import Goodput

DEFAULT_CONCURRENCY = "1,4,16"
PLOT_FORMATS = (".png", ".svg")


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


_LOAD, _REQUESTS, _RESULTS, _CONNECTION = "Load", "Requests", "Results", "Connection"

UrlArgument = Annotated[
    str,
    typer.Argument(
        envvar="PREFIXD_URL",
        metavar="URL",
        help="The server: of prefixd, vLLM, llama.cpp, Ollama or another with OpenAI's API.",
    ),
]
ConcurrencyOption = Annotated[
    str | None,
    _option(
        _LOAD,
        f"Requests at a time, a level for each number. Default: {DEFAULT_CONCURRENCY}.",
        metavar="N,N,…",
    ),
]
RequestRateOption = Annotated[
    str | None,
    _option(
        _LOAD,
        "Instead: requests per second that arrive at random (a Poisson process), a level for each "
        "rate; `inf` sends all at once.",
        metavar="R,R,…",
    ),
]
NumPromptsOption = Annotated[
    int | None,
    _option(
        _LOAD,
        "Requests of a level. Default: 4 times the concurrency, at least 16; for a rate 64.",
        min=1,
    ),
]
MaxSecondsOption = Annotated[
    float, _option(_LOAD, "Most seconds of a level; what still runs is aborted.", min=0.001)
]
SeedOption = Annotated[
    int | None,
    _option(
        _LOAD,
        "Draws prompts, models and arrivals. Default: another one each time, because a server may "
        "have kept the KV of prompts that it had before.",
    ),
]
ModelOption = Annotated[
    str | None,
    _option(
        _REQUESTS,
        "The model, or a prefix. Default: the first that the server lists.",
        "--model",
        "-m",
    ),
]
ModelsOption = Annotated[
    str | None, _option(_REQUESTS, "Several models or prefixes, used in turn.", metavar="A,B,…")
]
ZipfOption = Annotated[
    float | None,
    _option(
        _REQUESTS,
        "Draw from --models instead: the r-th with a probability proportional to 1 / r^ZIPF.",
        min=0.0,
    ),
]
InputTokensOption = Annotated[
    int, _option(_REQUESTS, "Tokens of a prompt, as far as words allow.", min=1)
]
OutputTokensOption = Annotated[int, _option(_REQUESTS, "Tokens of an output.", min=1)]
EndpointOption = Annotated[str, _option(_REQUESTS, "`completions` or `chat`.")]
GoodputOption = Annotated[
    list[str] | None,
    _option(
        _RESULTS,
        "Count requests within bounds in ms: `ttft:500,tpot:50`; `e2el` bounds the whole request.",
        metavar="NAME:MS,…",
    ),
]
JsonOption = Annotated[Path | None, _option(_RESULTS, "Write the figures as JSON.", "--json")]
PlotOption = Annotated[
    Path | None,
    _option(_RESULTS, "Draw them as .png or .svg; needs the extra `bench`.", "--plot"),
]
ApiKeyOption = Annotated[
    str | None, _option(_CONNECTION, "A key of your tenant.", envvar="PREFIXD_API_KEY")
]
TimeoutOption = Annotated[
    float,
    _option(
        _CONNECTION,
        "Seconds to wait for a response.",
        min=0.001,
        envvar="PREFIXD_TIMEOUT",
    ),
]


def _bad(option: str, expected: str, received: object) -> typer.BadParameter:
    return typer.BadParameter(f"expected {expected}; received {received!r}", param_hint=option)


def parse_loads(concurrency: str | None, request_rate: str | None) -> list[Load]:
    """The levels of a sweep, in the given order."""
    if request_rate is None:
        text = DEFAULT_CONCURRENCY if concurrency is None else concurrency
        return [Load(concurrency=number) for number in _integers(text)]
    if concurrency is not None:
        raise _bad("--request-rate", "--concurrency or --request-rate", "both")
    loads = []
    for part in request_rate.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = math.nan
        if not rate > 0:
            raise _bad("--request-rate", "rates above 0, or inf", part)
        loads.append(Load(rate=rate))
    return loads


def _integers(text: str) -> list[int]:
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise _bad("--concurrency", "whole numbers above 0", part)
        numbers.append(int(part))
    return numbers


def parse_models(model: str | None, models: str | None, zipf: float | None) -> tuple[str, ...]:
    """The models to use; none: the first that the server lists."""
    if model is not None and models is not None:
        raise _bad("--models", "--model or --models", "both")
    if models is None:
        if zipf is not None:
            raise _bad("--zipf", "--models with it, the most popular first", "--zipf alone")
        return () if model is None else (model,)
    names = tuple(name.strip() for name in models.split(","))
    if not all(names):
        raise _bad("--models", "names with commas between them", models)
    return names


def parse_endpoint(endpoint: str) -> Endpoint:
    """The endpoint to send to."""
    if endpoint not in get_args(Endpoint):
        raise _bad("--endpoint", " or ".join(get_args(Endpoint)), endpoint)
    return cast("Endpoint", endpoint)


def parse_goodput(bounds: Sequence[str]) -> Goodput | None:
    """The bounds of goodput, given in milliseconds; None for no bound."""
    seconds: dict[str, float] = {}
    for part in ",".join(bounds).split(",") if bounds else ():
        name, _, value = part.strip().partition(":")
        try:
            milliseconds = float(value)
        except ValueError:
            milliseconds = math.nan
        if name not in Goodput.__dataclass_fields__ or not 0 < milliseconds < math.inf:
            expected = "NAME:MILLISECONDS, with ttft, tpot or e2el and a number above 0"
            raise _bad("--goodput", expected, part)
        seconds[name] = milliseconds / 1000
    return Goodput(**seconds) if seconds else None


def check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Check before the measurement that its results can be written after it. Raises
    ModuleNotFoundError where the package that draws is missing."""
    for option, path in (("--json", json_file), ("--plot", plot_file)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise _bad(option, "a file in a folder that exists", str(path))
    if plot_file is not None:
        if plot_file.suffix.lower() not in PLOT_FORMATS:
            raise _bad("--plot", f"a file that ends in {' or '.join(PLOT_FORMATS)}", str(plot_file))
        import prefixd.server.cli.bench.plot  # noqa: F401 - only to find out that it can
