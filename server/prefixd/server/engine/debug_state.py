"""The scheduler's picture for an operator: who runs, who waits, what is resident, and why.

Ids, counts and names of tenants; never a token of a prompt or of an answer.
"""

from typing import Any

from prefixd.server.engine.residency import Entry
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence

_MOST_LISTED = 1000


def debug_state(scheduler: Scheduler, *, now: float) -> dict[str, Any]:
    """Plain data, ready for JSON. Of long lists the first 1000 are shown, and all are counted."""
    memory, prefix_loader, waiting = scheduler.memory, scheduler.prefix_loader, scheduler.waiting
    pool, residency, config = memory.pool, memory.residency, scheduler.config
    return {
        "pool": {
            "block_size": config.block_size,
            "blocks": pool.num_usable,
            "free": pool.num_free,
            "remembered": pool.num_remembered,
            "prefixes": residency.num_blocks,
        },
        "limits": {
            "max_running": scheduler.oom_backoff.max_running,
            "max_prefill_chunk": scheduler.oom_backoff.max_chunk,
            "max_tokens_per_step": config.max_tokens_per_step,
            "max_resident_tokens": config.max_resident_tokens,
            "max_waiting_tokens": config.max_waiting_tokens,
        },
        "running": {
            "count": len(scheduler.running),
            "sequences": [_sequence(s, now) for s in scheduler.running[:_MOST_LISTED]],
        },
        "waiting": {
            "count": len(waiting),
            "tokens": waiting.num_tokens,
            "tenants": [_tenant(scheduler, tenant, now) for tenant in waiting.tenants],
        },
        "prefixes": {
            "count": len(residency),
            "tokens": residency.num_tokens,
            "entries": [_entry(entry, memory.pinned) for entry in residency][:_MOST_LISTED],
        },
        "host": {"count": len(memory.host), "tokens": memory.host.num_tokens},
        "pins": [{"tenant": key.tenant, "digest": key.digest} for key in prefix_loader.pins],
        "warming": len(prefix_loader.preloads),
        "forcing": None if prefix_loader.forcing is None else prefix_loader.forcing.digest,
        "preemptions": scheduler.num_preemptions,
    }


def _sequence(sequence: Sequence, now: float) -> dict[str, Any]:
    return {
        "request_id": sequence.request.request_id,
        "index": sequence.index,
        "tenant": sequence.tenant,
        "prefix": sequence.prefix.key.digest if sequence.prefix else None,
        "prompt_tokens": sequence.num_prompt,
        "output_tokens": sequence.num_output,
        "cached_tokens": sequence.num_cached,
        "computed_tokens": sequence.num_computed,
        "blocks": len(sequence.block_table),
        "age_s": round(now - sequence.arrived, 3),
    }


def _tenant(scheduler: Scheduler, tenant: str, now: float) -> dict[str, Any]:
    waiting = scheduler.waiting
    line = waiting.of(tenant)
    return {
        "tenant": tenant,
        "count": len(line),
        "tokens": waiting.tokens_of(tenant),
        "counter": waiting.counter(tenant),
        "weight": waiting.weight(tenant),
        "oldest_s": round(now - min(sequence.arrived for sequence in line), 3),
    }


def _entry(entry: Entry, pinned: Any) -> dict[str, Any]:
    return {
        "tenant": entry.key.tenant,
        "digest": entry.key.digest,
        "tier": entry.stage.name.lower(),
        "tokens": entry.num_tokens,
        "compiled": entry.num_compiled,
        "blocks": len(entry.blocks),
        "users": entry.num_users,
        "pinned": entry.key in pinned,
        "leaving": entry.leaving,
        "retired": entry.retired,
    }
