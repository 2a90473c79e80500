"""The settings as help and reference show them: grouped by theme, with their defaults in words."""

from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin

from prefixd.server.serve.settings import ENV_PREFIX, Settings

SETTING_GROUPS = {
    "Model": (
        "cpu_kernels",
        "device",
        "dtype",
        "fingerprint_of",
        "generation_config",
        "model",
        "quantize",
        "served_model_name",
        "tensor_parallel",
        "threads",
        "tool_call_format",
    ),
    "Storage": (
        "audit_days",
        "blobs_timeout",
        "blobs_url",
        "catalog_timeout",
        "data_dir",
        "database_connect_timeout",
        "database_lock_timeout",
        "database_pool_timeout",
        "database_statement_timeout",
        "database_url",
        "file_days",
        "gc_grace",
        "gc_interval",
        "min_free_bytes",
    ),
    "KV memory": (
        "block_size",
        "host_kv_tokens",
        "kv_reuse",
        "kv_tokens",
        "max_pinned_tokens",
        "max_prefix_wait",
        "max_resident_tokens",
    ),
    "Queue and batch": (
        "max_prefill_chunk",
        "max_queue_wait",
        "max_running",
        "max_running_lines",
        "max_token_gap",
        "max_tokens_per_step",
        "max_waiting_tokens",
        "speculate",
        "watchdog",
    ),
    "HTTP": (
        "body_timeout",
        "host",
        "max_connections",
        "max_connections_per_address",
        "min_body_rate",
        "port",
        "shutdown_timeout",
        "trusted_proxies",
        "user_header",
        "write_timeout",
    ),
    "Limits": (
        "default_quota",
        "max_body_bytes",
        "max_choices",
        "max_import_bytes",
        "max_input_bytes",
        "max_prefix_bytes",
        "max_request_seconds",
        "max_tenant_body_bytes",
        "max_tenant_requests",
        "max_tenant_uploads",
        "max_virtual_tokens",
    ),
    "Logging": ("log_format", "log_level"),
}
"""The settings by theme, as help and reference list them; sorted within a theme."""

COMPUTED_DEFAULTS = {
    "audit_days": "kept without limit",
    "blobs_url": "files in data_dir",
    "database_url": "an SQLite file in data_dir",
    "default_quota": "docs/api.md, Limits of a tenant",
    "fingerprint_of": "none: a quantized model is its own base",
    "max_connections": "three quarters of the descriptors",
    "max_connections_per_address": "half of max_connections",
    "max_pinned_tokens": "a quarter of the pool",
    "max_request_seconds": "no limit",
    "max_resident_tokens": "as many as fit",
    "max_tenant_requests": "half of max_connections, at most 1024",
    "max_waiting_tokens": "eight times kv_tokens",
    "min_free_bytes": "256 MiB, or 5 % of the disk where that is less",
    "served_model_name": "taken from the model",
    "threads": "the usable cores",
    "trusted_proxies": "none",
    "user_header": "none: a body alone names a user",
}
"""What a setting without a fixed default does, in words."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the settings, as help and reference show it."""

    name: str
    description: str
    default: str
    is_computed: bool
    metavar: str | None

    @property
    def flag(self) -> str:
        """The flag of ``prefixd serve``."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """The environment variable."""
        return f"{ENV_PREFIX}{self.name.upper()}"

    @classmethod
    def of(cls, name: str) -> Self:
        """The setting ``name``."""
        field = Settings.model_fields[name]
        is_computed = field.default is None
        default = COMPUTED_DEFAULTS[name] if is_computed else str(field.default)
        if isinstance(field.default, bool):
            default = default.lower()
        return cls(name, field.description or "", default, is_computed, _metavar(field.annotation))


def settings_by_group() -> dict[str, list[Setting]]:
    """Every setting by theme, in the order of SETTING_GROUPS."""
    return {group: [Setting.of(name) for name in names] for group, names in SETTING_GROUPS.items()}


def _metavar(annotation: Any) -> str | None:
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    kinds = {bool: "true|false", int: "<int>", float: "<float>"}
    types = (annotation, *get_args(annotation))
    return next((metavar for kind, metavar in kinds.items() if kind in types), None)
