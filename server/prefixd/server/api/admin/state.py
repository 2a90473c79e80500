"""GET /v1/admin/state: the scheduler's picture, for the operator alone: it names all tenants."""

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from prefixd.server.api.auth import Operator
from prefixd.server.api.parts import EngineDep
from prefixd.server.errors import Unavailable

router = APIRouter(prefix="/v1/admin", tags=["admin"])


class EngineState(BaseModel):
    """Ids, counts and names of tenants; docs/api.md says what the parts mean."""

    model_config = ConfigDict(extra="allow")

    object: Literal["engine_state"] = "engine_state"
    ready: bool
    trouble: str | None


@router.get("/state", response_model=EngineState)
def engine_state(engine: EngineDep, _principal: Operator) -> dict[str, Any]:
    """Who runs, who waits, what is resident and pinned, as of this moment. Operator only."""
    try:
        debug_state = engine.state()
    except TimeoutError:
        reason = engine.trouble or "the engine is in the middle of a long step"
        raise Unavailable(reason, retry_after=1) from None
    trouble = engine.trouble
    return {"ready": trouble is None, "trouble": trouble, **debug_state}
