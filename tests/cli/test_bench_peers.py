"""``prefixd bench`` against servers that differ from ours, fail, or never end."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, Response
from typer.testing import CliRunner, Result

from prefixd.server.cli.main import app
from tests.cli.bench_servers import END, chunk, event, peer, whole
from tests.clients.loopback import loopback


def _bench(url: str, *arguments: str, code: int = 0) -> Result:
    few = (
        "--concurrency",
        "2",
        "--num-prompts",
        "6",
        "--input-tokens",
        "20",
        "--output-tokens",
        "8",
    )
    result = CliRunner().invoke(app, ["bench", url, *few, *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def _measured(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [body for body in bodies if body["max_tokens"] == 8]


def test_the_first_listed_model_is_measured():
    with peer(whole) as (state, url):
        _bench(url)
    assert {body["model"] for body in state.bodies} == {"peer"}
    assert len(_measured(state.bodies)) == 6


def test_prompts_are_as_long_as_usage_says():
    with peer(whole) as (state, url):  # two tokens for each word, and five
        result = _bench(url, "--input-tokens", "105")
    assert {len(body["prompt"].split()) for body in _measured(state.bodies)} == {50}
    assert "peer: 105 prompt and 8 output tokens on average" in result.stdout


def test_a_refused_field_is_left_out():
    def strict(body: dict[str, Any]) -> Any:
        if "ignore_eos" in body:
            return JSONResponse({"error": {"message": "unknown: ignore_eos"}}, status_code=400)
        return whole(body)

    with peer(strict) as (state, url):
        result = _bench(url)
    assert len(_measured(state.bodies)) == 6
    assert all("stream_options" in body for body in _measured(state.bodies))
    assert "the server refused, so it was not sent: ignore_eos" in result.stdout


def test_a_refusal_without_a_cure_is_reported_as_it_was():
    def refuse(body: dict[str, Any]) -> Any:
        return JSONResponse({"error": {"message": f"not {len(body)}"}}, status_code=400)

    with peer(refuse) as (state, url):
        result = _bench(url, code=1)
    assert result.stderr == "prefixd: not 7\n"
    assert len(state.bodies) == 4


def test_outputs_that_end_early_are_counted():
    def short(body: dict[str, Any]) -> Any:
        return whole({**body, "max_tokens": min(3, body["max_tokens"])})

    with peer(short) as (_, url):
        result = _bench(url)
    assert "6 of 6 outputs have fewer than 8 tokens" in result.stdout
    assert "3 output tokens on average" in result.stdout


def test_without_usage_events_with_text_are_counted():
    def no_usage(body: dict[str, Any]) -> Any:
        role = event({"choices": [{"index": 0, "text": "", "finish_reason": None}]})
        return [role, *whole({**body, "max_tokens": 5} | {"prompt": ""})[:5], END]

    with peer(no_usage) as (state, url):
        result = _bench(url)
    assert "5 output tokens on average" in result.stdout
    assert "the server reports no usage" in result.stdout
    assert {len(body["prompt"].split()) for body in _measured(state.bodies)} == {20}


def _failing(body: dict[str, Any], number: int) -> Any:
    """One failure of each kind, then whole answers."""
    failures: list[Any] = [
        JSONResponse(
            {"error": {"message": "too many requests", "code": "overloaded"}}, status_code=503
        ),
        Response("<html>", status_code=502),
        [chunk("a"), event({"error": {"message": "it broke", "code": "internal_error"}})],
        [chunk("a")],
        [b"data: no json\n\n"],
        [END],
    ]
    return failures[number] if number < len(failures) else whole(body)


def test_errors_are_counted_by_kind():
    numbers = iter(range(100))

    def answer(body: dict[str, Any]) -> Any:
        return _failing(body, next(numbers)) if body["max_tokens"] == 8 else whole(body)

    with peer(answer) as (_, url):
        lines = _bench(url, "--num-prompts", "8", "--concurrency", "1").stdout.splitlines()
    assert lines[1].split()[4:6] == ["2", "6"]
    kinds = {line.partition(": ")[2] for line in lines if " failed with " in line}
    assert kinds == {
        "1 failed with 503 overloaded: too many requests",
        "1 failed with 502 error: the server responded 502 without an error message",
        "1 failed with 500 internal_error: it broke",
        "1 failed with stream ended early: the stream ended before its closing event",
        "2 failed with invalid response: expected JSON in an event, received 'no json'",
    }


def _endless(body: dict[str, Any]) -> Any:
    return [chunk("a"), None] if body["max_tokens"] == 8 else whole(body)


def _bench_endless(limit: str, num_prompts: int) -> tuple[str, str]:
    """The limit in seconds, and the output; again with a longer one where this machine was too slow
    for the server to have both requests within it."""
    for seconds in ("0.2", "2", "20"):
        with peer(_endless) as (state, url):
            result = _bench(url, limit, seconds, "--num-prompts", str(num_prompts), code=1)
            if len(_measured(state.bodies)) >= 2:
                assert state.hung_up.wait(30)
                break
    assert len(_measured(state.bodies)) == 2
    return seconds, result.stdout


def test_a_request_that_never_ends_times_out_and_is_aborted():
    _, output = _bench_endless("--timeout", 2)
    assert "2 failed with timed out" in output


def test_a_level_ends_at_its_limit_and_the_rest_is_counted():
    seconds, output = _bench_endless("--max-seconds", 5)
    assert f"5 not finished (limit of {seconds} s)" in output


@pytest.fixture
def own_interrupt() -> Iterator[None]:
    """The handler of a new process: a test before may have set another, or none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("own_interrupt")
def test_an_interrupt_prints_what_was_measured(tmp_path: Path):
    main = threading.main_thread().ident
    assert main is not None
    numbers = iter(range(100))

    def answer(body: dict[str, Any]) -> Any:
        if body["max_tokens"] != 8 or next(numbers) < 3:
            return whole(body)
        signal.pthread_kill(main, signal.SIGINT)
        return [chunk("a"), None]

    report = tmp_path / "report.json"
    with peer(answer) as (state, url):
        result = _bench(
            url, "--concurrency", "1,4", "--num-prompts", "5", "--json", str(report), code=130
        )
        assert state.hung_up.wait(30)
    rows = result.stdout.splitlines()
    assert rows[1].split()[:6] == ["1", "at", "a", "time", "3", "2"]
    assert "1 at a time: 2 not finished (interrupted)" in result.stdout
    assert '"interrupted": true' in report.read_text("utf-8")


def test_a_path_that_the_server_lacks_names_the_other_endpoint():
    def missing(_: dict[str, Any]) -> Any:
        return Response("not here", status_code=404)

    with peer(missing) as (_, url):
        result = _bench(url, code=1)
    assert result.stderr.endswith("(try --endpoint chat)\n")


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"data": [{}]}'])
def test_a_list_of_models_that_is_none_asks_for_a_name(body: bytes):
    with loopback() as server:
        server.reply(body)
        result = _bench(server.url, code=1)
    assert "name one with --model" in result.stderr
    assert result.stderr.count("\n") == 1
