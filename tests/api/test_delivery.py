"""From the engine to a client's connection: how often the event loop is woken, and what is written
at once."""

import asyncio
from collections.abc import Callable

import pytest

from prefixd.server.api.generate.generation import EventDelivery
from prefixd.server.engine.request import Event, FinishEvent, FinishReason, TokenEvent
from tests.api.api_world import World, fake_text
from tests.api.test_completions import events
from tests.api.test_disconnect import Caller, run_with_engine

STREAMS, TOKENS = 6, 10


def texts(frames: bytes) -> list[str]:
    return [event["choices"][0]["text"] for event in events(frames.decode())]


async def frames_of(caller: Caller) -> list[bytes]:
    """The bodies that were sent, after the response has ended."""
    bodies = []
    while not caller.sent.empty():
        bodies.append((await caller.sent.get()).get("body", b""))
    return bodies


def test_the_loop_is_woken_once_for_a_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many streams have tokens in it."""
    wakes: list[int] = []
    deliver = EventDelivery.deliver

    def count(self: EventDelivery) -> None:
        wakes.append(len(world.runner.steps))
        deliver(self)

    monkeypatch.setattr(EventDelivery, "deliver", count)
    prompts = [f"p{number}" for number in range(STREAMS)]

    async def scenario() -> None:
        callers = [
            Caller(world, {"stream": True, "max_tokens": TOKENS, "prompt": prompt})
            for prompt in prompts
        ]
        await asyncio.gather(*(caller.run() for caller in callers))
        for caller, prompt in zip(callers, prompts, strict=True):
            text = "".join(texts(b"".join(await frames_of(caller))))
            assert text == fake_text(None, prompt, TOKENS)

    run_with_engine(world, scenario)
    assert len(wakes) == len(set(wakes)) <= len(world.runner.steps)


def test_tokens_that_are_ready_at_once_are_sent_in_one_write(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is an event of its own all the same."""
    held: list[Callable[[], None]] = []
    deliver = EventDelivery.deliver
    monkeypatch.setattr(EventDelivery, "deliver", lambda self: held.append(lambda: deliver(self)))

    async def scenario() -> None:
        caller = Caller(world, {"stream": True, "max_tokens": TOKENS, "prompt": "hello"})
        request = asyncio.create_task(caller.run())
        while len(held) < TOKENS or not world.engine.idle:  # noqa: ASYNC110 - of the engine's thread
            await asyncio.sleep(0.001)
        held[0]()
        await request
        bodies = [body for body in await frames_of(caller) if body]
        assert len(bodies) == 2
        assert bodies[0].count(b"data: ") == TOKENS
        assert "".join(texts(bodies[0] + bodies[1])) == fake_text(None, "hello", TOKENS)

    run_with_engine(world, scenario)


def test_what_the_next_step_adds_waits_for_the_rest_of_that_step() -> None:
    """The engine adds events while the loop takes those of the step before."""
    received: list[int] = []

    async def scenario() -> None:
        delivery = EventDelivery(asyncio.get_running_loop())

        def receive(choice: int, event: Event) -> None:
            received.append(choice)
            if choice == 0:  # the text of the next step, whose end is still to come
                delivery.add(receive, 1, event)

        text = TokenEvent(0, "x", (1,))
        delivery.add(receive, 0, text)
        delivery.deliver()
        await asyncio.sleep(0)
        assert received == [0]
        delivery.add(receive, 2, FinishEvent(0, FinishReason.LENGTH, completion_tokens=1))
        delivery.deliver()
        await asyncio.sleep(0)
        assert received == [0, 1, 2]

    asyncio.run(scenario())
