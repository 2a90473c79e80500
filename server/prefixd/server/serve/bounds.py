"""The bounds of one tenant, and of batches, that the settings select."""

from datetime import timedelta

from prefixd.server.api.batch_options import BatchOptions
from prefixd.server.api.tenant_bounds import TenantBounds
from prefixd.server.serve.connection_limits import ConnectionLimits, raise_descriptor_limit
from prefixd.server.serve.settings import Settings

_MOST_REQUESTS = 1024


def tenant_bounds(settings: Settings) -> TenantBounds:
    """The bounds of each tenant on this server. Unless the operator says otherwise, its requests
    take half of the connections at most."""
    limits = ConnectionLimits.of(
        descriptors=raise_descriptor_limit(),
        total=settings.max_connections,
        per_address=settings.max_connections_per_address,
        trusted=settings.trusted_proxies or "",
    )
    half = max(1, min(_MOST_REQUESTS, limits.total // 2))
    return TenantBounds(
        max_requests=settings.max_tenant_requests or half,
        max_uploads=settings.max_tenant_uploads,
        max_body_bytes=settings.max_tenant_body_bytes,
    )


def batch_options(settings: Settings) -> BatchOptions:
    """What the settings say of files and batches."""
    return BatchOptions(max_lines=settings.max_running_lines, files_kept=files_kept(settings))


def files_kept(settings: Settings) -> timedelta | None:
    """For how long files and ended batches are kept; None: without an end."""
    return None if settings.file_days is None else timedelta(days=settings.file_days)
