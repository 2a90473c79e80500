"""Streams over HTTP with a device that takes 8 ms a step: the engine in step with it, or behind.

    python -m benchmarks.one_behind [--streams N] [--tokens N] [--rounds N] [--profile FILE]

The application is that of the tests' ``api_world``, served by the socket and parser of ``prefixd
serve``. The device is a clock: a step ends 8 ms after it was submitted, or after the one before it
ended, and takes no CPU. So what is measured is whether the host keeps it busy: ``depth`` 0 plans a
step when the last one has ended, ``depth`` 1 while it runs. The client is a C program
(``stream_client.c``, compiled with ``cc``). Runs alternate; the result is the median.
"""

import argparse
import cProfile
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from benchmarks.http_cost import open_when_started
from benchmarks.serving import machine
from prefixd.server.engine.runner import Masks
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.serve.connection_limits import ConnectionLimits
from prefixd.server.serve.http import ConnectionTimeouts, HttpServer, bind, uvicorn_config
from prefixd.server.serve.logging import configure
from tests.api import api_world
from tests.engine.crowded_pools import InstantRunner

STEP_S = 0.008
_DEPTHS = (0, 1)


class Device(api_world.GatedRunner):
    """Steps that end on time, one after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self._outputs: deque[tuple[float, StepOutput]] = deque()
        self._free_at = 0.0

    def submit(self, step: Step) -> None:
        self._free_at = max(self._free_at, time.perf_counter()) + STEP_S
        self._outputs.append((self._free_at, InstantRunner().run(step)))

    def complete(self, masks: Callable[[], Masks]) -> None:
        raise NotImplementedError

    def collect(self) -> StepOutput:
        ends_at, output = self._outputs.popleft()
        time.sleep(max(0.0, ends_at - time.perf_counter()))
        return output


def child(folder: Path, depth: int, profile: str | None) -> None:
    """The server: prints port and key, and serves until its stdin ends."""
    configure("error", "json")
    api_world.POOL_BLOCKS = 8192
    with api_world.make_world(folder, runner=Device(depth)) as world:
        listener = bind("127.0.0.1", 0)
        config = uvicorn_config(
            world.make_app(),
            timeouts=ConnectionTimeouts(30, 30),
            limits=ConnectionLimits(10_000, 10_000),
            metrics=world.metrics,
        )
        server = HttpServer(config)

        def stop_at_the_end() -> None:
            sys.stdin.read()
            server.should_exit = True

        threading.Thread(target=stop_at_the_end, daemon=True).start()
        port = listener.getsockname()[1]
        print(json.dumps({"port": port, "key": world.keys["beta"]}), flush=True)
        if profile is None:
            server.run(sockets=[listener])
        else:
            profiler = cProfile.Profile()
            profiler.runcall(server.run, sockets=[listener])
            profiler.dump_stats(profile)


def measure(client: Path, depth: int, options: argparse.Namespace) -> float:
    """Tokens a second of all streams together, in a server of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.one_behind", "--child", folder, str(depth)]
        command += ["--profile", options.profile] if options.profile else []
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as server:
            assert server.stdout is not None
            started = json.loads(server.stdout.readline())
            open_when_started(started["port"])
            # The first request of a server costs more.
            for streams, tokens in ((1, 10), (options.streams, options.tokens)):
                ran = subprocess.run(
                    [client, str(started["port"]), str(streams), str(tokens)],
                    input=_request(started["key"], tokens),
                    stdout=subprocess.PIPE,
                    check=True,
                )
            server.communicate()
    events, seconds, early = ran.stdout.split()
    assert int(early) == 0, f"{int(early)} streams ended early"
    return int(events) / float(seconds)


def _request(key: str, tokens: int) -> bytes:
    body = {"model": "tiny", "prompt": "x" * 64, "max_tokens": tokens, "stream": True}
    text = json.dumps(body | {"ignore_eos": True, "kv_reuse": False}).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"content-type: application/json\r\nauthorization: Bearer %b\r\n"
        b"content-length: %d\r\n\r\n%b" % (key.encode(), len(text), text)
    )


def main() -> None:
    """Alternate depths and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", help="write the profile of the server's main thread")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(Path(options.child[0]), int(options.child[1]), options.profile)
        return
    with tempfile.TemporaryDirectory() as folder:
        client = Path(folder) / "stream_client"
        source = Path(__file__).with_name("stream_client.c")
        subprocess.run(["cc", "-O2", "-o", client, source], check=True)
        rates: dict[int, list[float]] = {depth: [] for depth in _DEPTHS}
        for number in range(options.rounds):
            for depth in _DEPTHS if number % 2 == 0 else _DEPTHS[::-1]:
                rates[depth].append(measure(client, depth, options))
    possible = options.streams / STEP_S
    print(machine())
    for depth, values in rates.items():
        median = statistics.median(values)
        spread = f"{min(values):.0f} to {max(values):.0f}"
        share = 100 * median / possible
        print(f"depth {depth}: {median:.0f} tokens/s ({spread}), {share:.1f} % of {possible:.0f}")


if __name__ == "__main__":
    main()
