"""Client library and command-line verbs that talk to a prefixd server.

>>> from clients import Client
>>> with Client(api_key="…") as client:
...     client.upload_folder("triage", Path("triage/"))
...     print(client.complete("My parcel is late.", model="triage").text)
"""

from clients.aio import AsyncClient, AsyncStream
from clients.errors import ApiError, ClientError
from clients.retry import RetryPolicy
from clients.sync import Client, Stream
from clients.types import (
    Binding,
    BindingPage,
    Chunk,
    Completion,
    Model,
    Prefix,
    PrefixPage,
    PrefixUsed,
    Uploaded,
    Usage,
    VersionPage,
    Warmed,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "Binding",
    "BindingPage",
    "Chunk",
    "Client",
    "ClientError",
    "Completion",
    "Model",
    "Prefix",
    "PrefixPage",
    "PrefixUsed",
    "RetryPolicy",
    "Stream",
    "Uploaded",
    "Usage",
    "VersionPage",
    "Warmed",
]
