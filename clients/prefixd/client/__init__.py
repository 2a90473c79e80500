"""Python client of a prefixd server, synchronous and asynchronous.

>>> from prefixd.client import Client
>>> with Client(api_key="…") as client:
...     client.upload_folder("triage", Path("triage/"))
...     print(client.complete("My parcel is late.", model="triage").text)
"""

from prefixd.client.aio import AsyncClient, AsyncStream
from prefixd.client.errors import ApiError, ClientError, PreconditionFailedError
from prefixd.client.protocol_tokens import Tokens
from prefixd.client.scores import Loglikelihood, ScoredChoice
from prefixd.client.sync import Client, Stream
from prefixd.client.transport import RetryPolicy
from prefixd.client.types import (
    Agreement,
    AuditEntry,
    AuditPage,
    Batch,
    BatchPage,
    Binding,
    BindingPage,
    Choice,
    Completion,
    CompletionChunk,
    File,
    FilePage,
    FunctionCall,
    Key,
    KeyPage,
    Member,
    Model,
    Prefix,
    PrefixPage,
    PrefixUsed,
    Recipe,
    Tenant,
    TenantPage,
    ToolCall,
    ToolCallDelta,
    Uploaded,
    Usage,
    VersionPage,
    Warmed,
)
from prefixd.client.wire import Progress

__all__ = [
    "Agreement",
    "ApiError",
    "AsyncClient",
    "AsyncStream",
    "AuditEntry",
    "AuditPage",
    "Batch",
    "BatchPage",
    "Binding",
    "BindingPage",
    "Choice",
    "Client",
    "ClientError",
    "Completion",
    "CompletionChunk",
    "File",
    "FilePage",
    "FunctionCall",
    "Key",
    "KeyPage",
    "Loglikelihood",
    "Member",
    "Model",
    "PreconditionFailedError",
    "Prefix",
    "PrefixPage",
    "PrefixUsed",
    "Progress",
    "Recipe",
    "RetryPolicy",
    "ScoredChoice",
    "Stream",
    "Tenant",
    "TenantPage",
    "Tokens",
    "ToolCall",
    "ToolCallDelta",
    "Uploaded",
    "Usage",
    "VersionPage",
    "Warmed",
]
