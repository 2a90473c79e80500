"""Backlogged tenants get equal service: the bound of Sheng et al. (OSDI 2024), theorem 4.4."""

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.engine import step_budget
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.testing import FakeRunner, FakeStaged

BLOCK, BLOCKS, STEPS, ROWS = 4, 24, 250, 6
LONGEST_PREFIX, LONGEST_PROMPT = 16, 24
LARGEST_INPUT = LONGEST_PREFIX + LONGEST_PROMPT
MOST_RUNNING = BLOCKS * BLOCK + (ROWS - 1) * LONGEST_PREFIX
"""Tokens charged to all that run: each pays for the prefix that it shares."""

traffics = st.fixed_dictionaries(
    {
        "weight": st.sampled_from([0.5, 1.0, 2.0]),
        "clients": st.integers(1, 12),
        "prompt": st.integers(1, LONGEST_PROMPT),
        "output": st.integers(1, 12),
        "prefixes": st.integers(0, 3),
        "starts_at": st.integers(0, 120),
    }
)


class Simulation:
    """Tenants that keep requests queued from a given step on, and the service of each."""

    def __init__(self, tenants: dict[str, dict], seed: int, *, background: bool = False) -> None:
        self.background = background
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=BLOCKS + 1,
                block_size=BLOCK,
                max_tokens_per_step=24,
                max_token_gap_s=0.1,
                max_running=ROWS,
            )
        )
        self.runner = FakeRunner(block_size=BLOCK)
        self.tenants = tenants
        self.chance = random.Random(seed)
        self.ids = itertools.count()
        self.service: Counter[str] = Counter()
        scheduler = self.scheduler
        self.waiting = scheduler.background.waiting if background else scheduler.waiting
        charge = self.waiting.charge

        def charge_and_count(tenant: str, tokens: int) -> None:
            self.service[tenant] += tokens / tenants[tenant]["weight"]
            charge(tenant, tokens)

        self.waiting.charge = charge_and_count  # type: ignore[method-assign]

    def ask(self, tenant: str) -> None:
        traffic, number = self.tenants[tenant], next(self.ids)
        handle = None
        if traffic["prefixes"]:
            length = 4 * self.chance.randint(1, LONGEST_PREFIX // 4)
            which = self.chance.randrange(traffic["prefixes"])
            handle = PrefixHandle(PrefixKey(tenant, f"{which}-{length}"), length)
        prompt = tuple(self.chance.choices(range(256), k=self.chance.randint(1, traffic["prompt"])))
        request = AdmittedRequest(
            request_id=str(number),
            tenant=tenant,
            prompt=prompt,
            prefix=handle,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(max_tokens=self.chance.randint(1, traffic["output"])),
            weight=traffic["weight"],
            background=self.background,
        )
        self.scheduler.add(Sequence(number, request, 0, 0, list(prompt)))

    def ready(self) -> set[str]:
        memory = self.scheduler.memory
        return {s.tenant for s in self.waiting if memory.is_ready(s)}

    def step(self, moment: int) -> None:
        for tenant, traffic in self.tenants.items():
            if moment >= traffic["starts_at"]:
                for _ in range(traffic["clients"] - len(self.waiting.of(tenant))):
                    self.ask(tenant)
        step = self.scheduler.schedule(now=moment / 10)
        speed = self.chance.choice([0.001, 0.01, 0.05])
        self.scheduler.step_budget.observe(step, speed * step.num_tokens)
        self.scheduler.update(step, self.runner.run(step))
        for key in step.fetches:
            self.scheduler.prefix_staged(key, FakeStaged(int(key.digest.split("-")[1])))


@pytest.fixture(autouse=True, scope="module")
def smallest_budgets() -> Iterator[None]:
    """Bound steps down to a single prompt token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_budget, "LEAST", 1)
        yield


@settings(max_examples=60, deadline=None)
@given(
    tenants=st.fixed_dictionaries({"a": traffics, "b": traffics, "c": traffics}),
    seed=st.integers(),
    background=st.booleans(),
)
def test_two_backlogged_tenants_differ_in_service_by_at_most_the_bound(
    tenants: dict[str, dict], seed: int, background: bool
) -> None:
    simulation = Simulation(tenants, seed, background=background)
    since: dict[tuple[str, str], float] = {}
    for step in range(STEPS):
        before = simulation.ready()
        simulation.step(step)
        backlogged = before & simulation.ready()
        for one, other in itertools.combinations(sorted(tenants), 2):
            if not {one, other} <= backlogged:
                since.pop((one, other), None)
                continue
            ahead = simulation.service[one] - simulation.service[other]
            began = since.setdefault((one, other), ahead)
            least = min(tenants[one]["weight"], tenants[other]["weight"])
            bound = 2 * max(LARGEST_INPUT, MOST_RUNNING) / least
            assert abs(ahead - began) <= bound


def test_preloads_compiled_while_idle_do_not_reduce_later_service() -> None:
    traffic = {
        "weight": 1.0,
        "clients": 6,
        "prompt": 4,
        "output": 4,
        "prefixes": 0,
        "starts_at": 100,
    }
    simulation = Simulation({"a": traffic, "b": {**traffic, "starts_at": 98}}, seed=0)
    for number in range(40):
        handle = PrefixHandle(PrefixKey("a", f"{number}-16"), 16)
        simulation.scheduler.prefix_loader.preloads.add(handle, cap=None, now=0.0)
    for step in range(100):
        simulation.step(step)
    assert simulation.service["a"] == 40 * 16
    for step in range(100, 200):
        simulation.step(step)
        ahead = simulation.service["b"] - (simulation.service["a"] - 40 * 16)
        assert abs(ahead) <= 2 * BLOCKS * BLOCK
    assert simulation.service["b"] > 2 * BLOCKS * BLOCK
