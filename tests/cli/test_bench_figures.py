"""The arithmetic of ``prefixd bench``, and its HTTP: percentiles, goodput, draws, framing."""

import asyncio
import statistics
from collections import Counter
from itertools import islice, pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from prefixd.client.errors import ClientError, ProtocolError
from prefixd.server.cli.bench.connection import ConnectionClosed, ConnectionPool, Reply
from prefixd.server.cli.bench.generation import Generation
from prefixd.server.cli.bench.levels import Level, Load
from prefixd.server.cli.bench.summary import Goodput, percentile, summarize
from prefixd.server.cli.bench.workload import PromptSource, arrival_times, draw_models


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_are_those_of_numpy(count: int):
    values = sorted(Random(count).expovariate(1.0) for _ in range(count))
    for percent in (0, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def _generation(first: float, gap: float, tokens: int, **fields: Any) -> Generation:
    arrived = tuple(first + gap * number for number in range(tokens))
    return Generation(
        "m",
        arrived[-1],
        arrived=arrived,
        prompt_tokens=10,
        output_tokens=tokens,
        has_usage=True,
        **fields,
    )


def test_the_figures_of_a_level():
    results = [
        _generation(0.1, 0.02, 5, late=0.003),
        _generation(0.3, 0.04, 5),
        _generation(0.2, 0.0, 1),  # no time per token after the first
        Generation("m", 1.0, error="503 overloaded", message="full"),
        Generation("m", 1.0, error="timed out", message="late"),
        Generation("m", 1.0, error="503 overloaded", message="still full"),
    ]
    level = Level(Load(concurrency=2), 8, results, seconds=2.0, client_cpu=0.5)
    bounds = Goodput(ttft=0.25, tpot=0.03)
    figures = summarize(level, goodput=bounds, output_tokens=5)
    assert (figures["completed"], figures["failed"], figures["unfinished"]) == (3, 3, 2)
    assert figures["errors"] == {
        "503 overloaded": {"count": 2, "message": "full"},
        "timed out": {"count": 1, "message": "late"},
    }
    assert figures["output_throughput"] == 11 / 2.0
    assert figures["total_token_throughput"] == (11 + 30) / 2.0
    assert figures["request_throughput"] == 1.5
    assert (figures["good_requests"], figures["request_goodput"]) == (2, 1.0)
    assert figures["short_outputs"] == 1
    assert figures["max_send_delay_ms"] == 3.0
    assert figures["median_ttft_ms"] == pytest.approx(200.0)
    assert figures["std_ttft_ms"] == pytest.approx(1000 * statistics.stdev([0.1, 0.2, 0.3]))
    assert figures["mean_tpot_ms"] == pytest.approx(30.0)
    assert figures["median_itl_ms"] == pytest.approx(30.0)
    assert figures["p99_e2el_ms"] == pytest.approx(
        1000 * float(np.percentile([0.18, 0.46, 0.2], 99))
    )


@pytest.mark.parametrize(
    ("bounds", "good"),
    [
        ({}, True),
        ({"ttft": 0.1}, True),
        ({"ttft": 0.099}, False),
        ({"tpot": 0.021}, True),
        ({"tpot": 0.019}, False),
        ({"e2el": 0.19}, True),
        ({"e2el": 0.17}, False),
        ({"ttft": 0.2, "tpot": 0.01}, False),
    ],
    ids=str,
)
def test_goodput_needs_every_bound(bounds: dict[str, float], good: bool):
    assert Goodput(**bounds).is_met(_generation(0.1, 0.02, 5)) is good


def test_a_level_without_a_response_has_no_times():
    figures = summarize(Level(Load(rate=1.0), 3), goodput=None, output_tokens=5)
    assert figures["median_ttft_ms"] is None
    assert figures["tokens_counted_by"] is None
    assert figures["output_throughput"] == 0.0


def test_prompts_do_not_repeat_even_where_words_run_out():
    source = PromptSource(1)
    prompts = [source.draw(1) for _ in range(2000)]
    assert len(set(prompts)) == 2000
    assert all(prompts)


def test_popularity_falls_with_the_rank():
    models = [str(rank) for rank in range(1, 51)]
    drawn = Counter(draw_models(models, 20000, zipf=1.0, random=Random(3)))
    assert drawn["1"] / drawn["2"] == pytest.approx(2, rel=0.1)
    assert drawn["1"] / drawn["10"] == pytest.approx(10, rel=0.25)
    assert draw_models(["a", "b"], 3, zipf=None, random=Random(3)) == ["a", "b", "a"]


def test_arrivals_have_the_mean_and_the_spread_of_a_poisson_process():
    times = list(islice(arrival_times(20.0, random=Random(5)), 4000))
    waits = [later - earlier for earlier, later in pairwise([0.0, *times])]
    assert statistics.fmean(waits) == pytest.approx(0.05, rel=0.05)
    assert statistics.stdev(waits) == pytest.approx(0.05, rel=0.1)
    assert list(islice(arrival_times(float("inf"), random=Random(5)), 3)) == [0.0, 0.0, 0.0]


# -- HTTP -----------------------------------------------------------------------------------------

CHUNKED = (
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7\r\ndata: a\r\n3\r\n\n\nb\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nabc"


class _RawServer:
    """Sends scripted bytes for each request: one script a connection, one entry a request, the
    pieces of an entry one by one. The connection is closed after its script."""

    def __init__(self, *scripts: list[list[bytes]]) -> None:
        self.scripts = iter(scripts)
        self.num_connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        for pieces in next(self.scripts):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
        writer.close()


def _exchange(server: _RawServer, count: int) -> list[Reply | ClientError]:
    async def everything() -> list[Reply | ClientError]:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            pool = ConnectionPool(f"http://127.0.0.1:{port}", {})
            results: list[Reply | ClientError] = []
            for _ in range(count):
                try:
                    results.append(await pool.send("GET", "/"))
                except ClientError as error:
                    results.append(error)
            pool.close()
        return results

    return asyncio.run(everything())


@pytest.mark.parametrize(
    ("response", "body"),
    [(CHUNKED, b"data: a\n\nb"), (SIZED, b"abc"), (UNTIL_CLOSE, b"abc")],
    ids=["chunked", "sized", "until-close"],
)
def test_a_response_cut_at_every_byte_is_read(response: bytes, body: bytes):
    pieces = [response[at : at + 1] for at in range(len(response))]
    (reply,) = _exchange(_RawServer([pieces]), 1)
    assert isinstance(reply, Reply)
    assert (reply.status, reply.body) == (200, body)


def test_a_connection_is_used_again():
    server = _RawServer([[CHUNKED], [SIZED], [CHUNKED]])
    replies = _exchange(server, 3)
    assert [isinstance(reply, Reply) for reply in replies] == [True] * 3
    assert server.num_connections == 1


def test_a_connection_that_the_server_closed_when_idle_is_replaced():
    server = _RawServer([[SIZED]], [[SIZED]], [[SIZED]])
    replies = _exchange(server, 3)
    assert [isinstance(reply, Reply) for reply in replies] == [True] * 3
    assert server.num_connections == 3


def test_half_a_response_is_an_error_and_not_sent_again():
    server = _RawServer([[CHUNKED], [CHUNKED[:-4]]])
    first, second = _exchange(server, 2)
    assert isinstance(first, Reply)
    assert isinstance(second, ConnectionClosed)
    assert server.num_connections == 1


def test_what_is_no_http_is_an_error():
    (error,) = _exchange(_RawServer([[b"SSH-2.0-OpenSSH\r\n\r\n"]]), 1)
    assert isinstance(error, ProtocolError)
