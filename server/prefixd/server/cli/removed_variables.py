"""Variables that a verb no longer reads: it ends and names what replaced them."""

import os

import typer

REMOVED_VARIABLES = {
    "audit": {
        "PREFIXD_AUDIT_BEFORE": "--before",
        "PREFIXD_AUDIT_LIMIT": "--limit",
        "PREFIXD_AUDIT_TENANT": "--tenant",
    },
    "chat": {
        "PREFIXD_CHAT_MAX_TOKENS": "--max-tokens",
        "PREFIXD_CHAT_MODEL": "--model",
        "PREFIXD_CHAT_SYSTEM": "--system",
        "PREFIXD_CHAT_TEMPERATURE": "--temperature",
    },
    "copy": {
        "PREFIXD_COPY_TO_BLOBS_URL": "--to-blobs-url",
        "PREFIXD_COPY_TO_DATABASE_URL": "--to-database-url",
        "PREFIXD_COPY_TO_DATA_DIR": "--to-data-dir",
    },
    "demo": {
        "PREFIXD_DEMO_DIR": "--data-dir",
        "PREFIXD_DEMO_EXAMPLES": "--examples",
        "PREFIXD_DEMO_ONCE": "--once",
        "PREFIXD_DEMO_PORT": "--port",
    },
    "gc": {"PREFIXD_GC_DRY_RUN": "--dry-run"},
    "key create": {
        "PREFIXD_KEY_EXPIRES_IN_DAYS": "--expires-in-days",
        "PREFIXD_KEY_LABEL": "--label",
        "PREFIXD_KEY_SCOPE": "--scope",
        "PREFIXD_KEY_TENANT": "--tenant",
    },
    "key ls": {"PREFIXD_KEY_TENANT": "--tenant"},
    "key rotate": {"PREFIXD_KEY_OVERLAP_HOURS": "--overlap-hours"},
    "prefix push": {
        "PREFIXD_METADATA": "--metadata",
        "PREFIXD_TASK_ID": "--task-id",
        "PREFIXD_TEXT": "--text",
        "PREFIXD_WARM": "--warm",
    },
    "prefix rm": {"PREFIXD_YES": "--yes"},
    "tenant create": {
        "PREFIXD_TENANT_KV_REUSE": "--kv-reuse/--no-kv-reuse",
        "PREFIXD_TENANT_WEIGHT": "--weight",
    },
    "tenant set": {
        "PREFIXD_TENANT_KV_REUSE": "--kv-reuse/--no-kv-reuse",
        "PREFIXD_TENANT_WEIGHT": "--weight",
    },
    "user default": {"PREFIXD_REMOVE": "rm"},
}
"""Variables that a verb read up to version 0.1.0, and what replaces each: a flag, or a verb.

To ignore one silently would be dangerous: `gc` with PREFIXD_GC_DRY_RUN set would delete data.
"""


def check_removed_variables(verb: str) -> None:
    """End the verb with status 2 if one of its removed variables is set."""
    for variable, replacement in REMOVED_VARIABLES.get(verb, {}).items():
        if os.environ.get(variable):
            typer.echo(
                f"prefixd: {variable} is set, but `prefixd {verb}` no longer reads it: unset it "
                f"and use `prefixd {verb} {replacement}`",
                err=True,
            )
            raise typer.Exit(2)
