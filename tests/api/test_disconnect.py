"""Disconnects, stopping servers and slow bodies: nothing runs for a client that is gone."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import structlog

from prefixd.server.api.generate.event_encoder import sse_event
from prefixd.server.api.generate.event_stream import EventStream, while_connected
from prefixd.server.api.middleware import REQUEST_ID_HEADER, ReceiveTimeout
from prefixd.server.api.request_record import ClientGone
from prefixd.server.errors import PrefixdError
from tests.api.api_world import World

SEQUENCES = 3


class Caller:
    """A request sent directly to the ASGI application: the test decides when it disconnects."""

    def __init__(
        self,
        world: World,
        body: dict[str, Any],
        path: str = "/v1/completions",
        method: str = "POST",
    ) -> None:
        self.method = method
        self.world = world
        self.body = json.dumps({"model": "tiny", "prompt": "hello", **body}).encode()
        self.path = path
        self.disconnects = asyncio.Event()
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._body_sent = False

    async def receive(self) -> dict[str, Any]:
        if not self._body_sent:
            self._body_sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.disconnects.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.sent.put(message)

    async def run(self) -> None:
        key = self.world.keys["acme"].encode()
        headers = [
            (b"authorization", b"Bearer " + key),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(self.body)),
        ]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "headers": headers,
        }
        await self.world.app(scope, self.receive, self.send)  # type: ignore[arg-type]


def run_with_engine(world: World, scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with world.app.router.lifespan_context(world.app):
            await scenario()

    asyncio.run(main())


async def aborted(world: World) -> int:
    """Sequences aborted by the engine. Two more steps run first: statistics are those of the last
    step, and earlier aborts must have been processed."""
    await Caller(world, {"max_tokens": 2}).run()
    return world.engine.stats().finished.get("abort", 0)


def outcome(world: World, name: str) -> float:
    labels = {"endpoint": "completions", "outcome": name}
    registry = world.metrics.registry
    return registry.get_sample_value("prefixd_generation_requests_total", labels) or 0.0


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_before_the_first_token_aborts(world: World, *, stream: bool) -> None:
    async def scenario() -> None:
        world.runner.gate.clear()
        caller = Caller(world, {"stream": stream, "max_tokens": 300, "n": SEQUENCES})
        request = asyncio.create_task(caller.run())
        assert await asyncio.to_thread(world.runner.entered.wait, 20)
        caller.disconnects.set()
        await request
        world.runner.gate.set()
        assert await aborted(world) == SEQUENCES

    run_with_engine(world, scenario)
    assert outcome(world, "aborted") == 1
    assert len(world.runner.steps) <= 3
    world.engine.core.scheduler.check_integrity()


def test_disconnect_during_a_stream_aborts(world: World) -> None:
    world.runner.hold_after = 3

    async def scenario() -> None:
        caller = Caller(world, {"stream": True, "max_tokens": 300, "n": SEQUENCES})
        request = asyncio.create_task(caller.run())
        start = await caller.sent.get()
        assert dict(start["headers"])[REQUEST_ID_HEADER.encode()]
        first = await caller.sent.get()
        assert first["body"].startswith(b"data: {")
        assert await asyncio.to_thread(world.runner.held.wait, 20)
        caller.disconnects.set()
        await request
        world.runner.gate.set()
        assert await aborted(world) == SEQUENCES

    run_with_engine(world, scenario)
    assert outcome(world, "aborted") == 1
    assert world.engine.stats().generated_tokens < 300 * SEQUENCES


def test_engine_failure_during_a_stream_sends_an_error_event(world: World) -> None:
    world.runner.hold_after = 3

    async def scenario() -> None:
        caller = Caller(world, {"stream": True, "max_tokens": 300})
        request = asyncio.create_task(caller.run())
        await caller.sent.get()
        await caller.sent.get()
        assert await asyncio.to_thread(world.runner.held.wait, 20)
        world.runner.fail = True
        world.runner.gate.set()
        await request
        frames = b""
        while not caller.sent.empty():
            frames += (await caller.sent.get()).get("body", b"")
        *_, last, done, rest = frames.split(b"\n\n")
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == "engine_error"
        assert set(error) == {"message", "type", "code", "param", "request_id"}
        assert b"secret" not in frames
        assert (done, rest) == (b"data: [DONE]", b"")

    run_with_engine(world, scenario)
    assert outcome(world, "error") == 1


@pytest.mark.parametrize("turns", [0, 1])
def test_a_disconnect_that_comes_when_the_work_is_done_cancels_nothing(turns: int) -> None:
    gone = asyncio.Event()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def scenario() -> None:
        async with while_connected(receive):
            await asyncio.sleep(0)
            gone.set()
            for _ in range(turns):  # one later, the work would be cancelled
                await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("disconnects", [False, True])
def test_a_cancelled_task_stays_cancelled_when_its_client_disconnects(*, disconnects: bool) -> None:
    gone = asyncio.Event()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        async with while_connected(receive):
            await asyncio.Event().wait()

    async def scenario() -> None:
        task = asyncio.create_task(work())
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        if disconnects:
            gone.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


@pytest.mark.parametrize("failing", ["payloads", "send"])
def test_os_error_is_a_disconnect_only_when_it_comes_from_the_client(failing: str) -> None:
    sent: list[dict[str, Any]] = []
    running = AsyncExitStack()
    outcomes: list[BaseException | None] = []
    running.push(lambda _kind, error, _traceback: outcomes.append(error))

    def ending(error: PrefixdError | None) -> bytes:
        return b"the end" if error is None else error.code.encode()

    async def payloads() -> AsyncGenerator[bytes]:
        yield sse_event({"number": 1})
        if failing == "payloads":
            raise FileNotFoundError("a file of the tokenizer")
        yield sse_event({"number": 2})

    async def send(message: Any) -> None:
        if failing == "send" and sent:
            raise BrokenPipeError
        sent.append(message)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def scenario() -> None:
        chunks = payloads()
        stream = EventStream(
            await anext(chunks), chunks, running=running, headers={}, ending=ending
        )
        await stream({}, receive, send)

    if failing == "send":
        asyncio.run(scenario())
        assert isinstance(outcomes[0], ClientGone)
        assert len(sent) == 1
        return
    with pytest.raises(FileNotFoundError):
        asyncio.run(scenario())
    assert isinstance(outcomes[0], FileNotFoundError)
    assert sent[-1]["body"] == b"internal_error"


def test_stopping_server_ends_streams_with_an_error_event(world: World) -> None:
    world.runner.hold_after = 3

    async def scenario() -> None:
        caller = Caller(world, {"stream": True, "max_tokens": 300})
        request = asyncio.create_task(caller.run())
        await caller.sent.get()
        await caller.sent.get()
        assert await asyncio.to_thread(world.runner.held.wait, 20)
        engine = world.engine
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        while engine.ready:
            await asyncio.to_thread(lambda: None)  # lets the other thread run
        world.runner.gate.set()
        await stopping
        await request
        frames = b""
        while not caller.sent.empty():
            frames += (await caller.sent.get()).get("body", b"")
        assert b'"code":"shutting_down"' in frames
        assert frames.endswith(b"data: [DONE]\n\n")

    run_with_engine(world, scenario)


def test_stalled_body_is_408(world: World) -> None:
    class Stalling(Caller):
        async def receive(self) -> dict[str, Any]:
            if not self._body_sent:
                self._body_sent = True
                return {"type": "http.request", "body": b"{", "more_body": True}
            await asyncio.Event().wait()
            raise AssertionError

    async def scenario() -> None:
        caller = Stalling(world, {})
        await caller.run()
        assert (await caller.sent.get())["status"] == 408

    set_body_timeout(world, body_timeout=0.05)
    run_with_engine(world, scenario)


def test_disconnect_during_the_body_is_logged_as_499(world: World) -> None:
    class Leaving(Caller):
        async def receive(self) -> dict[str, Any]:
            if not self._body_sent:
                self._body_sent = True
                return {"type": "http.request", "body": b"{", "more_body": True}
            return {"type": "http.disconnect"}

    async def scenario() -> None:
        caller = Leaving(world, {})
        await caller.run()
        assert caller.sent.empty()

    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, scenario)
    assert [(line["event"], line["status"]) for line in lines] == [("request", 499)]


def test_body_below_the_minimum_rate_is_408(world: World) -> None:
    pieces = 0

    class Slow(Caller):
        async def receive(self) -> dict[str, Any]:
            nonlocal pieces
            pieces += 1
            await asyncio.sleep(0.02)  # within the longest pause, but few bytes
            return {"type": "http.request", "body": b" ", "more_body": True}

    async def scenario() -> None:
        caller = Slow(world, {})
        await caller.run()
        assert (await caller.sent.get())["status"] == 408

    set_body_timeout(world, body_timeout=0.1)
    run_with_engine(world, scenario)
    assert pieces <= 6


def test_receive_timeout_counts_only_time_spent_waiting() -> None:
    """A body of any size at the minimum rate is received completely."""

    async def no_message() -> dict[str, Any]:
        raise AssertionError

    timeout = ReceiveTimeout(pause=1.0, min_rate=100, messages=no_message)
    waited, received = 0.0, 0
    for _ in range(1000):
        assert timeout.remaining(waited=waited, received=received) >= 0.5
        waited, received = waited + 0.5, received + 50
    assert timeout.remaining(waited=3.0, received=100) < 0


def set_body_timeout(world: World, *, body_timeout: float) -> None:
    world.app = world.make_app(body_timeout=body_timeout)
