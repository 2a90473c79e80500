"""Client library and command-line verbs that talk to a prefixd server.

>>> from prefixd.client import Client
>>> with Client(api_key="…") as client:
...     client.upload_folder("triage", Path("triage/"))
...     print(client.complete("My parcel is late.", model="triage").text)
"""

from prefixd.client.aio import AsyncClient, AsyncStream
from prefixd.client.errors import ApiError, ClientError
from prefixd.client.retry import RetryPolicy
from prefixd.client.sync import Client, Stream
from prefixd.client.types import (
    Binding,
    BindingPage,
    Completion,
    CompletionChunk,
    Model,
    Prefix,
    PrefixPage,
    PrefixUsed,
    Uploaded,
    Usage,
    VersionPage,
    Warmed,
)
from prefixd.client.types_admin import AuditEntry, AuditPage, Key, KeyPage, Tenant, TenantPage

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "AuditEntry",
    "AuditPage",
    "Binding",
    "BindingPage",
    "Client",
    "ClientError",
    "Completion",
    "CompletionChunk",
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
