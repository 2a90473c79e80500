"""What both shells need of httpx2: a request out of plain data, an answer as plain data, errors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypedDict

import httpx2

from prefixd.client.answers import Response, dump
from prefixd.client.errors import (
    ClientError,
    ConnectError,
    ProtocolError,
    TimedOutError,
    TransportError,
)
from prefixd.client.protocol import Request

DEFAULT_URL = "http://127.0.0.1:8000"
# Reading waits for the whole generation unless it is streamed; connecting is quick or hopeless.
DEFAULT_TIMEOUT = 300.0
CONNECT_TIMEOUT = 5.0


class ClientOptions(TypedDict):
    """Keyword arguments the two httpx2 clients share."""

    base_url: str
    headers: dict[str, str]
    timeout: httpx2.Timeout


def client_options(url: str, *, api_key: str | None, timeout: float) -> ClientOptions:
    """Options for an httpx2 client that talks to one server as one key.

    ``ClientError`` for a key that no header can carry.
    """
    headers = {"user-agent": "prefixd-client"}
    key = (api_key or "").strip()  # one read from a file ends in a newline
    if not (key.isascii() and key.isprintable()):
        raise ClientError("the API key holds a character that no key has: copy it once more")
    if key:
        headers["authorization"] = f"Bearer {key}"
    limits = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))
    return ClientOptions(base_url=url, headers=headers, timeout=limits)


@contextmanager
def built(client: httpx2.Client | httpx2.AsyncClient, request: Request) -> Iterator[httpx2.Request]:
    """The request ready to send; files of a multipart body stay open inside."""
    with ExitStack() as files:
        parts = [
            (
                part.name,
                (
                    part.filename,
                    files.enter_context(part.content.open("rb"))
                    if isinstance(part.content, Path)
                    else part.content,
                    part.content_type,
                ),
            )
            for part in request.parts
        ]
        body, kind = _body(request)
        yield client.build_request(
            request.method,
            request.path,
            params=dict(request.params) or None,
            content=body,
            files=parts or None,
            headers=None if body is None else {"content-type": kind},
        )


def _body(request: Request) -> tuple[bytes | None, str]:
    if request.ndjson is not None:
        return request.ndjson, "application/x-ndjson"
    return None if request.json is None else dump(request.json), "application/json"


def plain(response: httpx2.Response) -> Response:
    """The answer as plain data; its body must have been read."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Response(status=response.status_code, headers=headers, body=response.content)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn httpx2's errors into ours: callers depend on one library's errors only."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise ConnectError(f"cannot connect to {url}: {error or 'timed out'}") from error
    except httpx2.TimeoutException as error:
        raise TimedOutError(f"{url} did not answer in time") from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ProtocolError(f"{url!r} is no URL of a server: {error}") from error
    except httpx2.TransportError as error:
        raise TransportError(f"lost the connection to {url}: {error}") from error
