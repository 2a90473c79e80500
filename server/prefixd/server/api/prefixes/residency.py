"""What brings a prefix into the pool before a request does: warming, and the room for pins."""

from collections.abc import Callable

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import from_queue_full
from prefixd.server.api.generate.admission import check_resident, handle_of
from prefixd.server.api.generate.resolver import check_served
from prefixd.server.api.prefixes.manifests import key_of
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import QueueFull
from prefixd.server.errors import DoesNotFit, PrefixdError, Unavailable
from prefixd.server.tenants.principal import Principal
from prefixd.server.tenants.quotas import PinRoom, check_pinned
from prefixd.store.catalog.pins import pinned
from prefixd.store.errors import StoreError
from prefixd.store.store import Manifest, PrefixStore

log = structlog.get_logger("prefixd")

RESIDENT = "resident"
QUEUED = "queued"
"""Asked for, and the engine has not begun."""


def check_fits(
    manifest: Manifest, principal: Principal, *, engine: Engine, served: ServedModel
) -> None:
    """Raise Conflict, EngineFailure, QuotaExceeded or DoesNotFit for a version that no request of
    its tenant could ever run under here."""
    check_served(manifest, served)
    check_resident(manifest, principal.quota.max_resident_tokens)
    if engine.config.max_tokens_for(manifest.num_virtual_tokens) < 1:
        raise DoesNotFit(
            f"the {manifest.num_virtual_tokens} virtual tokens of "
            f"{manifest.name}@{manifest.version} can never fit the KV pool"
        )


def warm(
    manifest: Manifest,
    principal: Principal,
    *,
    engine: Engine,
    served: ServedModel,
    drain_state: DrainState,
) -> str:
    """Have a version made resident, and say where it is. Raises as ``check_fits``, and Unavailable
    where the engine takes no more."""
    check_fits(manifest, principal, engine=engine, served=served)
    if drain_state.closed:
        raise drain_state.refusal()
    if not engine.ready:
        raise Unavailable("the engine is not running", retry_after=1)
    state = engine.tier(key_of(manifest))
    if state == RESIDENT:
        return state
    try:
        engine.preload(
            handle_of(manifest),
            max_resident_tokens=principal.quota.max_resident_tokens,
        )
    except QueueFull as full:
        raise from_queue_full(full, drain_state) from None
    return state or QUEUED


def try_warm(
    reference: str,
    principal: Principal,
    *,
    store: PrefixStore,
    engine: Engine,
    served: ServedModel,
    drain_state: DrainState,
) -> None:
    """``warm`` where that is possible; what stands against it is for the log. Blocking."""
    try:
        manifest = store.resolve(tenant=principal.tenant, reference=reference)
        warm(manifest, principal, engine=engine, served=served, drain_state=drain_state)
    except (PrefixdError, StoreError, SQLAlchemyError) as error:
        why = str(error).partition("\n")[0]
        log.info("not warmed", tenant=principal.tenant, prefix=reference, why=why)


def pin_room(config: SchedulerConfig, max_pinned_tokens: int | None) -> PinRoom:
    """The room for all pins together: ``max_pinned_tokens``, else a quarter of the pool."""
    tokens = max_pinned_tokens
    if tokens is None:
        pool = config.num_usable_blocks * config.block_size
        tokens = min(pool, config.max_resident_tokens or pool) // 4
    return PinRoom(tokens, config.block_size)


def room_for_pin(
    principal: Principal,
    then: Callable[[Connection, Manifest], None],
    *,
    engine: Engine,
    served: ServedModel,
    room: PinRoom,
) -> Callable[[Connection, Manifest], None]:
    """What the store is to call in the transaction of a pin: refuses it where there is no room, as
    ``check_fits`` and ``check_pinned`` do, and goes on to ``then``."""

    def check(connection: Connection, manifest: Manifest) -> None:
        check_fits(manifest, principal, engine=engine, served=served)
        check_pinned(
            pinned(connection, fingerprint=served.base.fingerprint),
            principal.tenant,
            principal.quota,
            room=room,
        )
        then(connection, manifest)

    return check
