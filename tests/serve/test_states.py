"""What a model whose layers keep a state turns off, and the pool that it needs."""

from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.serve.build import with_states

BASE: Any = SimpleNamespace(
    name="m", layers=SimpleNamespace(states=[SimpleNamespace(kind="Mamba2Mixer")])
)


def test_states_take_blocks_and_the_log_says_what_they_turn_off() -> None:
    config = SchedulerConfig(num_blocks=101, block_size=16, speculate=True)
    with capture_logs() as logs:
        config = with_states(config, BASE, state_blocks=20)
    assert (config.state_blocks, config.max_tokens_for(1)) == (20, (100 - 21 - 20) * 16)
    (line,) = logs
    assert (line["layers"], line["state_blocks"], line["as_much_as_tokens"]) == (
        "Mamba2Mixer",
        20,
        320,
    )
    assert "no KV is reused between requests, and no tokens are proposed" in line["event"]


def test_a_pool_without_room_for_a_sequence_under_a_prefix_is_refused() -> None:
    smallest = SchedulerConfig(num_blocks=1 + 42, block_size=16)
    assert with_states(smallest, BASE, state_blocks=20).max_tokens_for(1) >= 1
    with pytest.raises(UnsupportedModel, match=r"Mamba2Mixer.*at least 672, received 656"):
        with_states(SchedulerConfig(num_blocks=42, block_size=16), BASE, state_blocks=20)
