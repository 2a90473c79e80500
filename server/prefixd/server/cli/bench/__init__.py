"""``prefixd bench``: how fast an OpenAI-compatible server is for its users."""

import secrets

from prefixd.client.transport import DEFAULT_TIMEOUT, DEFAULT_URL
from prefixd.server.cli.bench import options
from prefixd.server.cli.bench.run import Measurement, Plan
from prefixd.server.cli.bench.show import run_and_show


def bench(
    url: options.UrlArgument = DEFAULT_URL,
    *,
    concurrency: options.ConcurrencyOption = None,
    request_rate: options.RequestRateOption = None,
    num_prompts: options.NumPromptsOption = None,
    max_seconds: options.MaxSecondsOption = 600.0,
    seed: options.SeedOption = None,
    model: options.ModelOption = None,
    models: options.ModelsOption = None,
    zipf: options.ZipfOption = None,
    input_tokens: options.InputTokensOption = 64,
    output_tokens: options.OutputTokensOption = 64,
    endpoint: options.EndpointOption = "completions",
    goodput: options.GoodputOption = None,
    json_file: options.JsonOption = None,
    plot_file: options.PlotOption = None,
    api_key: options.ApiKeyOption = None,
    timeout: options.TimeoutOption = DEFAULT_TIMEOUT,
) -> None:
    """Measure a server as its users see it: time to first token, between tokens, and rates."""
    plan = Plan(
        url=url,
        api_key=api_key,
        loads=options.parse_loads(concurrency, request_rate),
        seed=secrets.randbits(32) if seed is None else seed,
        endpoint=options.parse_endpoint(endpoint),
        models=options.parse_models(model, models, zipf),
        zipf=zipf,
        num_prompts=num_prompts,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        goodput=options.parse_goodput(goodput or ()),
        timeout=timeout,
        max_seconds=max_seconds,
    )
    options.check_files(json_file, plot_file)
    run_and_show(Measurement(plan), json_file=json_file, plot_file=plot_file)
