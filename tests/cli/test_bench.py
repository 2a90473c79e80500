"""``prefixd bench`` against our own application over the fake model: counts, JSON, errors."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from prefixd.client import Client
from prefixd.server.cli.main import app
from tests.api.api_world import make_world
from tests.cli.bench_servers import Recorder
from tests.clients.loopback import serving

Bench = Callable[..., Result]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Recorder, str, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as parts:
        recorder = Recorder(parts.app)
        with serving(recorder) as url:
            with Client(url, api_key=parts.keys["acme"]) as client:
                for name in ("alpha", "beta"):
                    client.upload_text(name, f"I am {name}.")
            yield recorder, url, parts.keys["acme"]


@pytest.fixture
def recorder(world: tuple[Recorder, str, str]) -> Recorder:
    world[0].reset()
    return world[0]


@pytest.fixture
def bench(world: tuple[Recorder, str, str]) -> Bench:
    _, url, key = world

    def run(*arguments: str | Path, code: int = 0, key: str = key, url: str = url) -> Result:
        environment = {"PREFIXD_API_KEY": key, "COLUMNS": "200"}
        words = ["bench", url, *(str(one) for one in arguments)]
        result = CliRunner().invoke(app, words, env=environment)
        assert result.exit_code == code, result.output
        return result

    return run


SMALL = ("--input-tokens", "40", "--output-tokens", "6")


def _sent(recorder: Recorder, output_tokens: int = 6) -> list[dict[str, Any]]:
    """The measured requests, without those that probe the server."""
    return [body for body in recorder.bodies if body["max_tokens"] == output_tokens]


def test_a_sweep_sends_exactly_its_requests_and_no_prompt_twice(bench: Bench, recorder: Recorder):
    recorder.awaited = 3
    result = bench("--concurrency", "3,1", "--num-prompts", "7", *SMALL)
    assert len(_sent(recorder)) == 14
    assert recorder.most_running == 3
    prompts = [body["prompt"] for body in recorder.bodies]
    assert len(set(prompts)) == len(prompts)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:6] for row in rows[1:3]] == [
        ["3", "at", "a", "time", "7", "0"],
        ["1", "at", "a", "time", "7", "0"],
    ]


def test_prompts_have_about_the_requested_number_of_tokens(bench: Bench, tmp_path: Path):
    # A token of the fake model is a byte, so this takes counting what a word costs.
    report = _report(bench, tmp_path, "--input-tokens", "120", "--num-prompts", "12")
    mean = report["levels"][0]["total_input_tokens"] / 12
    assert 100 < mean < 140


def test_every_run_draws_other_prompts_unless_it_is_seeded(bench: Bench, recorder: Recorder):
    few = ("--concurrency", "1", "--num-prompts", "3", *SMALL)
    runs = []
    for more in ((), (), ("--seed", "7"), ("--seed", "7")):
        recorder.reset()
        bench(*few, *more)
        runs.append([body["prompt"] for body in recorder.bodies])
    first, second, third, fourth = runs
    assert not set(first) & set(second)
    assert third == fourth


def _report(bench: Bench, folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "report.json"
    bench("--concurrency", "2", "--output-tokens", "6", "--json", path, *arguments)
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return report


LEVEL_FIELDS = {
    *("max_concurrency", "request_rate", "num_prompts", "completed", "failed", "unfinished"),
    *("errors", "duration", "client_cpu", "max_send_delay_ms", "total_input_tokens"),
    *("total_output_tokens", "short_outputs", "tokens_counted_by", "request_throughput"),
    *("request_goodput", "good_requests", "output_throughput", "total_token_throughput"),
    *(
        f"{statistic}_{name}_ms"
        for statistic in ("mean", "std", "median", "p90", "p95", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}
FIELDS = {
    *("url", "endpoint", "models", "zipf", "seed", "input_tokens", "output_tokens"),
    *("prompt_words", "goodput_ms", "fields_refused", "interrupted", "levels"),
}


def test_the_report_has_the_documented_fields(bench: Bench, tmp_path: Path):
    more = ("--num-prompts", "5", "--input-tokens", "40", "--goodput", "ttft:60000,tpot:60000")
    report = _report(bench, tmp_path, *more)
    assert set(report) == FIELDS
    (level,) = report["levels"]
    assert set(level) == LEVEL_FIELDS
    assert (level["completed"], level["failed"], level["unfinished"]) == (5, 0, 0)
    assert level["total_output_tokens"] == 30
    assert level["tokens_counted_by"] == "usage"
    # The duration is rounded to 0.1 ms, the throughput to a thousandth of a token.
    duration = pytest.approx(level["duration"], abs=1e-4, rel=1e-3)
    assert 30 / level["output_throughput"] == duration
    assert level["request_goodput"] == level["request_throughput"]
    assert report["goodput_ms"] == {"ttft": 60000.0, "tpot": 60000.0}
    page = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text("utf-8")
    named = {name for name in FIELDS | LEVEL_FIELDS if not name.endswith("_ms")}
    assert {name for name in named if f"`{name}`" not in page} == set()


def test_goodput_counts_only_requests_within_the_bounds(bench: Bench, tmp_path: Path):
    report = _report(bench, tmp_path, "--num-prompts", "4", "--goodput", "ttft:0.000001")
    assert report["levels"][0]["good_requests"] == 0
    assert report["levels"][0]["completed"] == 4


def test_models_take_turns_or_are_drawn_by_popularity(bench: Bench, recorder: Recorder):
    bench("--models", "alpha,beta", "--concurrency", "1", "--num-prompts", "8", *SMALL)
    assert [body["model"] for body in _sent(recorder)] == ["alpha", "beta"] * 4
    recorder.reset()
    steep = ("--models", "alpha,beta,tiny", "--zipf", "20", "--seed", "1")
    bench(*steep, "--concurrency", "1", "--num-prompts", "8", *SMALL)
    assert Counter(body["model"] for body in _sent(recorder)) == {"alpha": 8}


def test_arrivals_at_a_rate_are_sent_without_waiting_for_others(bench: Bench, recorder: Recorder):
    recorder.awaited = 2
    result = bench("--request-rate", "200,inf", "--num-prompts", "10", *SMALL)
    assert len(_sent(recorder)) == 20
    assert recorder.most_running > 1
    assert "200/s" in result.stdout
    assert "all at once" in result.stdout


def test_the_chat_endpoint(bench: Bench, recorder: Recorder):
    bench("--endpoint", "chat", "--concurrency", "2", "--num-prompts", "3", *SMALL)
    assert len(_sent(recorder)) == 3
    assert all(body["messages"][0]["role"] == "user" for body in recorder.bodies)


def test_a_url_may_end_in_the_base_path_of_openai_clients(bench: Bench, world: Any):
    bench("--concurrency", "1", "--num-prompts", "1", *SMALL, url=world[1] + "/v1/")


# -- errors ---------------------------------------------------------------------------------------


def test_an_error_of_every_request_is_counted_and_ends_with_status_1(bench: Bench):
    result = bench("--input-tokens", "4000", "--num-prompts", "3", "--concurrency", "1", code=1)
    assert "3 failed with 400 context_length_exceeded" in result.stdout


def test_a_wrong_key_is_one_line(bench: Bench):
    result = bench("--num-prompts", "1", code=1, key="pk-wrong")
    assert result.stderr.count("\n") == 1
    assert "the API key is not valid" in result.stderr
    assert result.stdout == ""


def test_an_unknown_model_is_one_line(bench: Bench):
    for models in (("-m", "nope"), ("--models", "alpha,nope")):
        result = bench(*models, code=1)
        assert result.stderr.count("\n") == 1
        assert "'nope' does not exist" in result.stderr


def test_a_server_that_does_not_listen_is_one_line(bench: Bench):
    result = bench(code=1, url="http://127.0.0.1:1")
    assert result.stderr == (
        "prefixd: cannot connect to http://127.0.0.1:1: connection refused: "
        "is the server running?\n"
    )


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:80", "http://", "http://a:b"])
def test_a_url_of_another_kind_is_one_line(bench: Bench, url: str):
    result = bench(code=1, url=url)
    assert result.stderr.startswith(f"prefixd: '{url}' is not the URL of a server")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--concurrency", "0"), "whole numbers above 0"),
        (("--concurrency", "1,two"), "received 'two'"),
        (("--request-rate", "-1"), "rates above 0"),
        (("--request-rate", "nan"), "rates above 0"),
        (("--request-rate", "1", "--concurrency", "1"), "--concurrency or --request-rate"),
        (("--goodput", "ttft"), "NAME:MILLISECONDS"),
        (("--goodput", "itl:5"), "NAME:MILLISECONDS"),
        (("--goodput", "tpot:0"), "NAME:MILLISECONDS"),
        (("--model", "a", "--models", "b"), "--model or --models"),
        (("--models", "a,,b"), "names with commas"),
        (("--zipf", "1"), "--models with it"),
        (("--endpoint", "responses"), "completions or chat"),
        (("--plot", "picture.pdf"), ".png or .svg"),
        (("--json", "/nonexistent/report.json"), "a folder that exists"),
        (("--num-prompts", "0"), "--num-prompts"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_ends_with_status_2(
    bench: Bench, recorder: Recorder, arguments: tuple[str, ...], expected: str
):
    result = bench(*arguments, code=2)
    assert expected in " ".join(result.stderr.replace("│", " ").split())
    assert recorder.bodies == []


# -- the plot -------------------------------------------------------------------------------------


def test_a_plot_without_matplotlib_names_the_extra_before_it_measures(
    bench: Bench, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "prefixd.server.cli.bench.plot", raising=False)
    result = bench("--plot", tmp_path / "plot.png", code=1)
    assert "pip install 'prefixd[bench]'" in result.stderr
    assert recorder.bodies == []


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_plot_is_drawn(bench: Bench, tmp_path: Path, suffix: str, start: bytes):
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    path = tmp_path / f"plot.{suffix}"
    bench("--concurrency", "1,2", "--num-prompts", "2", "--plot", path, *SMALL)
    assert path.read_bytes().startswith(start)
