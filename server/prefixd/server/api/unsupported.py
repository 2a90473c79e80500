"""Routes of OpenAI that this server refuses by name."""

from fastapi import APIRouter

from prefixd.server.api.dependencies import Generator
from prefixd.server.api.error_responses import ErrorBody
from prefixd.server.errors import BadRequest

router = APIRouter(prefix="/v1", tags=["generation"])


@router.post("/embeddings", status_code=400, response_model=ErrorBody)
async def create_embeddings(principal: Generator) -> None:
    """Refused: the server generates text."""
    del principal
    raise BadRequest(
        "embeddings are not supported by this server, which generates text; completions take "
        "embeddings in place of a prompt, as 'prompt_embeds'",
        code="embeddings_unsupported",
    )
