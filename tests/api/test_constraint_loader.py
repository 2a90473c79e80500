"""Grammars are compiled once, and those of one tenant cost no other."""

import asyncio
import threading
from collections import Counter
from collections.abc import Collection

import pytest

from prefixd.server.api.generate.constraints import MAX_KEPT, MAX_WAITING, ConstraintLoader
from prefixd.server.api.metrics import Metrics
from prefixd.server.engine.constraint import Constraint, Grammar, GrammarKind, GrammarRefused
from prefixd.server.errors import RateLimited
from tests.api.api_world import World
from tests.engine.constraints import Rule


def grammar(source: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, source)


class Compiler:
    """Counts what it compiles. Sources that begin with ``slow`` wait for ``gate``, and those that
    begin with ``bad`` are refused."""

    def __init__(self) -> None:
        self.compiled: Counter[str] = Counter()
        self.running: set[str] = set()
        self.most_slow = 0
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.closed = False

    def compile(self, grammar: Grammar) -> Constraint:
        source = grammar.source
        self.compiled[source] += 1
        if source.startswith("slow"):
            self.running.add(source)
            self.most_slow = max(self.most_slow, len(self.running))
            self.begun.release()
            assert self.gate.wait(30)
            self.running.discard(source)
        if source.startswith("bad"):
            raise GrammarRefused(f"{source} is bad")
        allowed: Collection[int] = b"x"
        return Rule(lambda _output: allowed)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def metrics(world: World) -> Metrics:
    return world.metrics


def test_tenant_with_slow_grammars_has_one_thread(compiler: Compiler, metrics: Metrics) -> None:
    async def run() -> None:
        loader = ConstraintLoader(compiler, metrics)
        slow = [
            asyncio.ensure_future(loader.compile("hostile", grammar(f"slow{index}")))
            for index in range(5)
        ]
        await asyncio.to_thread(compiler.begun.acquire)
        for index in range(20):
            await loader.compile("other", grammar(f"fast{index}"))
        assert not any(task.done() for task in slow)
        compiler.gate.set()
        await asyncio.gather(*slow)
        loader.close()

    asyncio.run(run())
    assert compiler.most_slow == 1
    assert compiler.closed


def test_cancelled_request_keeps_its_tenants_turn_until_the_thread_ends(
    compiler: Compiler, metrics: Metrics
) -> None:
    """Or clients that disconnect would give one tenant both threads."""

    async def run() -> None:
        loader = ConstraintLoader(compiler, metrics)
        first = asyncio.ensure_future(loader.compile("hostile", grammar("slow1")))
        await asyncio.to_thread(compiler.begun.acquire)
        first.cancel()
        second = asyncio.ensure_future(loader.compile("hostile", grammar("slow2")))
        await loader.compile("other", grammar("fast"))
        assert compiler.running == {"slow1"}
        compiler.gate.set()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        loader.close()

    asyncio.run(run())
    assert compiler.most_slow == 1


def test_waiting_grammars_of_a_tenant_are_bounded(compiler: Compiler, metrics: Metrics) -> None:
    async def run() -> None:
        loader = ConstraintLoader(compiler, metrics)
        waiting = [
            asyncio.ensure_future(loader.compile("hostile", grammar(f"slow{index}")))
            for index in range(MAX_WAITING)
        ]
        await asyncio.to_thread(compiler.begun.acquire)
        with pytest.raises(RateLimited, match="wait for a new schema") as refused:
            await loader.compile("hostile", grammar("one more"))
        assert refused.value.code == "too_many_grammars"
        await loader.compile("other", grammar("fast"))
        compiler.gate.set()
        await asyncio.gather(*waiting)
        loader.close()

    asyncio.run(run())


def test_grammar_is_compiled_once_for_each_tenant(compiler: Compiler, metrics: Metrics) -> None:
    async def run() -> None:
        loader = ConstraintLoader(compiler, metrics)
        same = [loader.compile("a", grammar("x")) for _ in range(8)]
        first, *others = await asyncio.gather(*same)
        assert all(other is first for other in others)
        assert await loader.compile("b", grammar("x")) is not first
        for _ in range(3):
            with pytest.raises(GrammarRefused, match="bad1 is bad"):
                await loader.compile("a", grammar("bad1"))
        loader.close()

    asyncio.run(run())
    assert compiler.compiled == {"x": 2, "bad1": 1}
    page = metrics.render().decode()
    assert 'prefixd_grammar_lookups_total{result="hit"} 9.0' in page
    assert 'prefixd_grammar_lookups_total{result="miss"} 3.0' in page
    assert 'prefixd_grammar_compile_seconds_count{outcome="refused"} 1.0' in page


def test_grammars_of_one_tenant_replace_none_of_another(
    compiler: Compiler, metrics: Metrics
) -> None:
    async def run() -> None:
        loader = ConstraintLoader(compiler, metrics)
        await loader.compile("other", grammar("kept"))
        for index in range(2 * MAX_KEPT):
            await loader.compile("hostile", grammar(f"{index}"))
        await loader.compile("other", grammar("kept"))
        await loader.compile("hostile", grammar("0"))
        loader.close()

    asyncio.run(run())
    assert compiler.compiled["kept"] == 1
    assert compiler.compiled["0"] == 2, "the oldest were dropped"
