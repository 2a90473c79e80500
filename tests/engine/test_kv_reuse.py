"""KV reuse by the hash chain: which blocks are shared, and which never are."""

from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import End, Sequence
from prefixd.server.testing import FakeRunner, FakeStaged

CONFIG = SchedulerConfig(num_blocks=200, block_size=4)


def run(
    scheduler: Scheduler,
    number: int,
    tokens: list[int],
    *,
    tenant: str = "a",
    prefix: tuple[str, int] | None = None,
    kv_reuse: bool = True,
) -> Sequence:
    """Serve one request alone, to its end."""
    handle = None if prefix is None else PrefixHandle(PrefixKey(tenant, prefix[0]), prefix[1])
    request = AdmittedRequest(
        request_id=str(number),
        tenant=tenant,
        prompt=tuple(tokens),
        prefix=handle,
        sampling=SamplingParams(temperature=0),
        stop=StopParams(max_tokens=1),
        kv_reuse=kv_reuse,
    )
    sequence = Sequence(number, request, 0, 0, list(tokens))
    scheduler.add(sequence)
    runner = scheduler.runner  # type: ignore[attr-defined]
    while not sequence.finished:
        step = scheduler.schedule()
        scheduler.update(step, runner.run(step))
        for key in step.fetches:
            assert handle is not None
            scheduler.prefix_staged(key, FakeStaged(handle.num_tokens))
    assert sequence.reason is FinishReason.LENGTH
    scheduler.check_integrity()
    return sequence


def scheduler_of(namespace: str = "model") -> Scheduler:
    scheduler = Scheduler(CONFIG, namespace=namespace)
    scheduler.runner = FakeRunner(block_size=4)  # type: ignore[attr-defined]
    return scheduler


identity = st.tuples(
    st.sampled_from("ab"), st.sampled_from([None, ("v1", 3), ("v2", 3), ("v3", 4), ("v4", 9)])
)


@given(
    requests=st.lists(
        st.tuples(identity, st.lists(st.integers(0, 1), min_size=1, max_size=20)),
        min_size=2,
        max_size=8,
    )
)
def test_full_blocks_of_equal_token_runs_are_shared_within_an_owner(requests: list) -> None:
    """An owner is a tenant and a prefix digest. The expectation uses only the requests."""
    scheduler = scheduler_of()
    before: list = []
    for number, ((tenant, prefix), tokens) in enumerate(requests):
        sequence = run(scheduler, number, tokens, tenant=tenant, prefix=prefix)
        offset = (prefix[1] if prefix else 0) % 4
        best = 0
        for owner, other in before:
            if owner != (tenant, prefix):
                continue
            equal = 0
            while equal < min(len(tokens) - 1, len(other)) and tokens[equal] == other[equal]:
                equal += 1
            best = max(best, (offset + equal) // 4 * 4 - offset)
        assert sequence.num_cached == best
        before.append(((tenant, prefix), tokens))


def test_request_without_kv_reuse_neither_reuses_nor_registers_blocks() -> None:
    scheduler = scheduler_of()
    tokens = list(range(12))
    assert run(scheduler, 0, tokens, kv_reuse=False).num_cached == 0
    assert run(scheduler, 1, tokens).num_cached == 0
    assert run(scheduler, 2, tokens, kv_reuse=False).num_cached == 0
    assert run(scheduler, 3, tokens).num_cached == 8
    reuse = scheduler.memory.reuse
    assert (reuse.num_queried_tokens, reuse.num_reused_tokens) == (24, 8)


def test_blocks_recomputed_after_preemption_are_registered_again() -> None:
    scheduler = scheduler_of()
    request = AdmittedRequest(
        "r", "a", tuple(range(12)), None, SamplingParams(temperature=0), StopParams(max_tokens=9)
    )
    sequence = Sequence(0, request, 0, 0, list(range(12)))
    scheduler.add(sequence)
    runner = scheduler.runner  # type: ignore[attr-defined]
    step = scheduler.schedule()
    scheduler.update(step, runner.run(step))
    scheduler.preempt(sequence)
    scheduler.memory.pool.forget(range(1, 200))  # as if other sequences had used the blocks since
    while not sequence.finished:
        step = scheduler.schedule()
        scheduler.update(step, runner.run(step))
    assert run(scheduler, 1, list(range(12))).num_cached == 8


def test_block_names_depend_on_the_namespace() -> None:
    names = []
    for namespace in ("float32", "bfloat16"):
        scheduler = scheduler_of(namespace)
        sequence = run(scheduler, 0, list(range(12)))
        names.append(list(sequence.block_names))
    assert len(names[0]) == 3
    assert not set(names[0]) & set(names[1])


def test_remembered_blocks_count_as_free() -> None:
    scheduler = scheduler_of()
    for number in range(120):
        run(scheduler, number, [number] * 11)
    pool = scheduler.memory.pool
    assert pool.num_free == pool.num_usable
    assert pool.num_remembered > 150
    # The oldest were reused first, and the newest are still registered.
    assert run(scheduler, 200, [0] * 11).num_cached == 0
    assert run(scheduler, 201, [119] * 11).num_cached == 8


def test_blocks_without_finite_logits_are_not_reused() -> None:
    """A half computed prompt may hold NaN: no token was sampled before the client disconnected."""
    scheduler = Scheduler(SchedulerConfig(num_blocks=200, block_size=4, max_prefill_chunk=8))
    scheduler.runner = FakeRunner(block_size=4)  # type: ignore[attr-defined]
    prompt = list(range(12))
    request = AdmittedRequest("r", "a", tuple(prompt), None, SamplingParams(), StopParams(1))
    half = Sequence(0, request, 0, 0, prompt)
    scheduler.add(half)
    step = scheduler.schedule()
    scheduler.update(step, scheduler.runner.run(step))  # type: ignore[attr-defined]
    assert half.num_computed == 8
    scheduler.end(half, End(FinishReason.ABORT))
    assert run(scheduler, 1, prompt).num_cached == 0
    assert run(scheduler, 2, prompt).num_cached == 8
