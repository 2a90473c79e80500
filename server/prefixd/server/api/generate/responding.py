"""From an admitted request to its response, whole or streamed, in any shape of answer."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.generate.event_stream import EventStream
from prefixd.server.api.generate.service import (
    CLIENT_CLOSED_REQUEST,
    GenerationService,
    Running,
)
from prefixd.server.api.metrics import Endpoint
from prefixd.server.api.request_record import ClientGone
from prefixd.server.errors import PrefixdError
from prefixd.server.tenants.principal import Principal


class Answer(Protocol):
    """One answer of a shape, over a request that runs."""

    async def whole(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        ...

    def chunks(self) -> AsyncGenerator[bytes]:
        """The events of a stream, without its end; those that are ready at once are yielded
        together. An error before the first of them is raised."""
        ...

    def ending(self, error: PrefixdError | None) -> bytes:
        """The last events, sent when the request holds nothing more; ``error``: it failed."""
        ...


async def respond(
    service: GenerationService,
    request: Request,
    principal: Principal,
    *,
    admit: Callable[[], Admitted],
    answer: Callable[[Running], Answer],
    endpoint: Endpoint,
    stream: bool,
    is_quick: bool,
    embedding_bytes: int = 0,
) -> Response:
    """Admit with ``admit``, run on the engine, and respond with its ``answer``. ``is_quick`` as of
    GenerationService.running."""
    try:
        async with AsyncExitStack() as contexts:
            running = await contexts.enter_async_context(
                service.running(
                    request,
                    principal,
                    admit,
                    endpoint=endpoint,
                    stream=stream,
                    is_quick=is_quick,
                    embedding_bytes=embedding_bytes,
                )
            )
            given = answer(running)
            if not stream:
                return JSONResponse(await given.whole(), 200, running.headers)
            chunks = given.chunks()
            await contexts.enter_async_context(aclosing(chunks))
            # The first chunk decides the status: a request that fails before it is answered
            # with an error and not with a stream.
            first = await anext(chunks)
            return EventStream(
                first,
                chunks,
                running=contexts.pop_all(),
                headers=running.headers,
                ending=given.ending,
            )
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
