"""The slice of the settings that the engine gets."""

from dataclasses import replace

import structlog

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.load import LoadedBase
from prefixd.server.serve.settings import Settings

log = structlog.get_logger("prefixd")

_QUEUED_POOLS = 8
"""How many times the pool's size may wait, unless the operator says otherwise."""


_KEPT_LOGITS, _KEPT_ON_CPU = 2**26, 2**24
"""Logits that a step keeps to score prompt tokens: 256 and 64 MiB in float32. On a CPU the time of
the softmax over them counts too."""


def scheduler_config(settings: Settings) -> SchedulerConfig:
    """The engine's slice of the settings."""
    return SchedulerConfig(
        num_blocks=-(-settings.kv_tokens // settings.block_size) + 1,  # and the null block
        block_size=settings.block_size,
        max_tokens_per_step=settings.max_tokens_per_step,
        max_prefill_chunk=settings.max_prefill_chunk,
        max_token_gap_s=settings.max_token_gap or None,
        max_running=settings.max_running,
        max_resident_tokens=settings.max_resident_tokens,
        host_tokens=settings.host_kv_tokens,
        max_prefix_wait_s=settings.max_prefix_wait,
        max_waiting_tokens=settings.max_waiting_tokens or _QUEUED_POOLS * settings.kv_tokens,
        max_queue_wait_s=settings.max_queue_wait or None,
        speculate=settings.speculate == "ngram",
    )


def with_scores(config: SchedulerConfig, base: LoadedBase) -> SchedulerConfig:
    """The slice with as many prompt tokens scored in a step as the model's vocabulary allows."""
    kept = _KEPT_ON_CPU if base.device.type == "cpu" else _KEPT_LOGITS
    return replace(config, max_scored=max(1, kept // base.num_logits))


def with_states(config: SchedulerConfig, base: LoadedBase, *, state_blocks: int) -> SchedulerConfig:
    """The slice of a model whose layers keep states, which take ``state_blocks`` of each sequence
    and prefix. Says in the log what that costs and turns off.

    Raises UnsupportedModel for a pool without room for a sequence under a prefix.
    """
    config = replace(config, state_blocks=state_blocks)
    kind, positions = base.layers.states[0].kind, state_blocks * config.block_size
    if config.max_tokens_for(1) < 1:
        raise UnsupportedModel(
            f"{base.name} keeps a state in its layers of {kind}, which takes {state_blocks} blocks "
            f"of each sequence and prefix; expected kv_tokens of at least "
            f"{2 * (positions + config.block_size)}, received "
            f"{config.num_usable_blocks * config.block_size}"
        )
    log.info(
        "layers keep a state: it takes blocks of each sequence and prefix, no KV is reused between "
        "requests, and no tokens are proposed",
        layers=kind,
        state_blocks=state_blocks,
        as_much_as_tokens=positions,
    )
    return config
