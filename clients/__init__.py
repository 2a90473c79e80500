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
from clients.types_admin import AuditEntry, AuditPage, Key, KeyPage, Tenant, TenantPage

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "AuditEntry",
    "AuditPage",
    "Binding",
    "BindingPage",
    "Chunk",
    "Client",
    "ClientError",
    "Completion",
    "Key",
    "KeyPage",
    "Model",
    "Prefix",
    "PrefixPage",
    "PrefixUsed",
    "RetryPolicy",
    "Stream",
    "Tenant",
    "TenantPage",
    "Uploaded",
    "Usage",
    "VersionPage",
    "Warmed",
]
