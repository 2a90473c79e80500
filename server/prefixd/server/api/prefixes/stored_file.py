"""A file as an answer, whole or a part of it."""

from http import HTTPStatus

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from prefixd.server.errors import BadRequest, RangeNotSatisfiable


class StoredFile(FileResponse):
    """Starlette's, but a bad Range is refused as everything else is, and not in plain text."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file. Raises BadRequest and RangeNotSatisfiable before anything is sent."""

        async def refuse_or_send(message: Message) -> None:
            match message.get("status"):
                case HTTPStatus.BAD_REQUEST:
                    raise BadRequest(
                        "expected a Range like bytes=0-99; received another", code="invalid_range"
                    )
                case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    size = Headers(raw=message["headers"])["content-range"]
                    raise RangeNotSatisfiable(
                        f"the file has {size.rpartition('/')[2]} bytes, the range begins beyond",
                        headers={"Content-Range": size},
                    )
            await send(message)

        await super().__call__(scope, receive, refuse_or_send)
