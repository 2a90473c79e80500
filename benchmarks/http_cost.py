"""CPU of the server without the model: for a request, for a streamed token, for a metered tenant.

``python -m benchmarks.http_cost [--rounds 5] [--requests 96] [--tokens 64] [--clients 32]``

The server is a process of its own with the socket, application, engine and a SQLite catalog of
``prefixd serve``; its runner samples at once and sleeps 5 ms a step. Its CPU is read by thread:
the event loop's, and that of all threads but the engine's. A token costs the difference between
answers of many tokens and of one, divided by their difference in tokens. Loads and tenants
alternate in one run; figures are medians over the rounds. *First token* is the median from sending
a request to an idle server until its first event, less the step.
"""

import argparse
import asyncio
import gc
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.serving import machine
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.connection_limits import ConnectionLimits
from prefixd.server.serve.http import ConnectionTimeouts, HttpServer, bind, uvicorn_config
from prefixd.server.serve.logging import configure
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.quotas import DEFAULT_QUOTA
from tests.api import api_world
from tests.engine.crowded_pools import InstantRunner

STEP_S = 0.005
LIMITED, UNLIMITED = "acme", "beta"


class SteadyRunner(api_world.GatedRunner):
    """Every step takes STEP_S, and no CPU."""

    def run(self, step: Step) -> StepOutput:
        time.sleep(STEP_S)
        return InstantRunner().run(step)


def child(folder: Path) -> None:
    """The server: prints port and keys, then the CPU seconds of its threads for each line read."""
    configure("info", "json")
    api_world.POOL_BLOCKS = 4096
    with api_world.make_world(folder, runner=SteadyRunner()) as world:
        world.limiter = Limiter(world.database)
        quota = asdict(DEFAULT_QUOTA) | {"requests_per_minute": 10**9, "tokens_per_minute": 10**12}
        world.tenants.set_quota(LIMITED, quota)
        listener = bind("127.0.0.1", 0)
        config = uvicorn_config(
            world.make_app(),
            timeouts=ConnectionTimeouts(30, 30),
            limits=ConnectionLimits(1000, 1000),
            metrics=world.metrics,
        )
        server = HttpServer(config)

        def report() -> None:
            for _ in sys.stdin:
                print(json.dumps(_cpu_seconds()), file=out, flush=True)
            server.should_exit = True

        gc.collect()
        gc.freeze()
        out = sys.stdout
        threading.Thread(target=report, daemon=True).start()
        keys = {name: world.keys[name] for name in (LIMITED, UNLIMITED)}
        print(json.dumps({"port": listener.getsockname()[1], "keys": keys}), flush=True)
        server.run(sockets=[listener])


def _cpu_seconds() -> dict[str, float]:
    clocks = {
        thread.name: time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        for thread in threading.enumerate()
        if thread.ident is not None
    }
    return {"loop": clocks["MainThread"], "all": time.process_time() - clocks["engine"]}


def open_when_started(port: int) -> None:
    """Wait until a server accepts connections: bound already, it refuses them until its application
    has started."""
    while True:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return


class Server:
    """The child process."""

    def __init__(self, folder: str) -> None:
        command = [sys.executable, "-m", "benchmarks.http_cost", "--child", folder]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started = self._read()
        self.port: int = started["port"]
        self.keys: dict[str, str] = started["keys"]
        open_when_started(self.port)

    def cpu_seconds(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the server has ended"
            read = json.loads(line)
            if "event" not in read:  # a line of the log
                return dict(read)


async def request(server: Server, tenant: str, tokens: int, *, stream: bool) -> float:
    """Send one request on a connection of its own; seconds until the first byte of its body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    body = {"model": "tiny", "prompt": "x" * 64, "max_tokens": tokens, "stream": stream}
    text = json.dumps(body | {"ignore_eos": True, "kv_reuse": False}).encode()
    sent = time.perf_counter()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"authorization: Bearer %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        % (server.keys[tenant].encode(), len(text))
        + text
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    await reader.readexactly(1)
    first = time.perf_counter() - sent
    received = await reader.read()
    assert not stream or b"[DONE]" in received
    writer.close()
    return first


async def load(
    server: Server, tenant: str, tokens: int, *, stream: bool, requests: int, clients: int
) -> dict[str, float]:
    """CPU seconds for one request of the load, by thread."""
    numbers = iter(range(requests))

    async def one() -> None:
        for _ in numbers:
            await request(server, tenant, tokens, stream=stream)

    before = server.cpu_seconds()
    await asyncio.gather(*(one() for _ in range(clients)))
    after = server.cpu_seconds()
    return {name: (after[name] - before[name]) / requests for name in after}


Figures = defaultdict[str, list[float]]


async def one_round(server: Server, options: argparse.Namespace, figures: Figures) -> None:
    common = {"requests": options.requests, "clients": options.clients}
    for tenant in (UNLIMITED, LIMITED):
        short = await load(server, tenant, 1, stream=True, **common)
        for name, seconds in short.items():
            figures[f"request, {tenant}, {name}: ms"].append(1e3 * seconds)
    for stream in (True, False):
        short = await load(server, UNLIMITED, 1, stream=stream, **common)
        long = await load(server, UNLIMITED, options.tokens, stream=stream, **common)
        kind = "streamed token" if stream else "token of a whole answer"
        for name, seconds in long.items():
            per_token = (seconds - short[name]) / (options.tokens - 1)
            figures[f"{kind}, {name}: us"].append(1e6 * per_token)
    for tenant in (UNLIMITED, LIMITED):
        first = [await request(server, tenant, 1, stream=True) for _ in range(8)]
        figures[f"first token of an idle server, {tenant}: ms"].append(
            1e3 * (statistics.median(first) - STEP_S)
        )


def main() -> None:
    """Measure and print the medians, with the quartiles of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    figures: Figures = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(folder)
        asyncio.run(one_round(server, options, defaultdict(list)))  # warm up
        for _ in range(options.rounds):
            asyncio.run(one_round(server, options, figures))
        server.close()
    print(machine())
    for name, values in figures.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{name:50} {median:8.2f}   ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
