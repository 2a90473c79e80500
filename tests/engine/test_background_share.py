"""The share of the background class follows measured times, on a simulated device."""

import itertools
import random
from collections.abc import Callable

import pytest

from prefixd.server.engine.background_share import PLAIN_EVERY, SLOWDOWN, BackgroundShare
from prefixd.server.engine.step import Chunk, Step

Device = Callable[[int, int], float]
_ids = itertools.count()


def chunk(size: int) -> Chunk:
    return Chunk(next(_ids), [1] * size, 0, ())


def linear(token: float) -> Device:
    return lambda rows, tokens: 0.03 + 0.001 * rows + token * tokens


def tiles(rows: int, tokens: int) -> float:
    """Sixteen rows at a time, so that the seventeenth costs as much as all of the next."""
    return 0.01 + 0.02 * -(-(rows + tokens) // 16)


def run(
    share: BackgroundShare, device: Device, *, rows: int = 16, steps: int = 600
) -> list[tuple[int, float]]:
    """Background tokens of each step, and by how much they prolonged it."""
    seen = []
    for _ in range(steps):
        step = Step(chunks=[chunk(1) for _ in range(rows)])
        tokens = share.tokens(step)
        if tokens:
            step.num_foreground, step.background_tokens = rows, tokens
            step.chunks.append(chunk(tokens))
        share.observe(step, device(rows, tokens))
        seen.append((tokens, device(rows, tokens) / device(rows, 0) - 1))
    return seen


def mean_slowdown(seen: list[tuple[int, float]]) -> float:
    return sum(slowdown for _, slowdown in seen) / len(seen)


@pytest.mark.parametrize("token", [0.00001, 0.0005, 0.002, 0.02])
@pytest.mark.parametrize("rows", [1, 16])
def test_it_takes_only_its_share(token: float, rows: int) -> None:
    share = BackgroundShare()
    run(share, linear(token), rows=rows)
    seen = run(share, linear(token), rows=rows)
    assert 0.7 * SLOWDOWN < mean_slowdown(seen) < 1.1 * SLOWDOWN
    assert min(tokens for tokens, _ in seen) == 0, "some steps are without it, to be measured"


def test_cheap_tokens_run_in_nearly_every_step() -> None:
    share = BackgroundShare()
    run(share, linear(0.0005))
    seen = run(share, linear(0.0005))
    assert sum(tokens > 0 for tokens, _ in seen) == pytest.approx(
        len(seen) * PLAIN_EVERY / (PLAIN_EVERY + 1), rel=0.02
    )
    assert max(slowdown for _, slowdown in seen) < 1.5 * SLOWDOWN


def test_a_share_of_few_tokens_is_taken_in_every_third_step() -> None:
    share = BackgroundShare()
    run(share, linear(0.003))
    seen = run(share, linear(0.003))
    assert sum(tokens > 0 for tokens, _ in seen) < 0.4 * len(seen)
    assert 0.6 * SLOWDOWN < mean_slowdown(seen) < 1.1 * SLOWDOWN


def test_most_steps_are_as_without_it_where_the_first_token_is_expensive() -> None:
    share = BackgroundShare()
    run(share, tiles)
    seen = run(share, tiles)
    prolonged = [tokens for tokens, slowdown in seen if slowdown > 1.5 * SLOWDOWN]
    assert 0 < len(prolonged) < len(seen) / 2
    assert mean_slowdown(seen) < 1.5 * SLOWDOWN


def test_slow_steps_of_other_causes_change_little() -> None:
    chance, share = random.Random(0), BackgroundShare()

    def disturbed(rows: int, tokens: int) -> float:
        return linear(0.001)(rows, tokens) * chance.choice([0.95, 1, 1, 1, 1.05, 1.05, 3])

    for _ in range(600):
        step = Step(chunks=[chunk(1) for _ in range(16)])
        tokens = share.tokens(step)
        if tokens:
            step.num_foreground, step.background_tokens = 16, tokens
            step.chunks.append(chunk(tokens))
        share.observe(step, disturbed(16, tokens))
    seen = run(share, linear(0.001), steps=60)
    assert 0.3 * SLOWDOWN < mean_slowdown(seen) < 2 * SLOWDOWN


def test_a_device_that_becomes_slower_gets_fewer_tokens() -> None:
    share = BackgroundShare()
    run(share, linear(0.0005))
    run(share, linear(0.005), steps=200)
    seen = run(share, linear(0.005))
    assert 0.6 * SLOWDOWN < mean_slowdown(seen) < 1.2 * SLOWDOWN


def test_other_numbers_of_rows_begin_with_what_is_known() -> None:
    share = BackgroundShare()
    run(share, linear(0.02), rows=16)
    assert mean_slowdown(run(share, linear(0.02), rows=15, steps=30)) < 1.5 * SLOWDOWN


def test_next_to_prompts_without_streams_it_takes_a_part_of_their_tokens() -> None:
    share = BackgroundShare()
    assert share.tokens(Step(chunks=[chunk(200)])) == 200 * SLOWDOWN
