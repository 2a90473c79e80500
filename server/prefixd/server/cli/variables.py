"""``PREFIXD_*`` variables that nothing reads: one warning, with the nearest known name."""

import os
from collections.abc import Iterable
from difflib import get_close_matches

from prefixd.server.cli.removed_variables import REMOVED_VARIABLES
from prefixd.server.serve.settings import ENV_PREFIX, Settings

_OTHER_VARIABLES = (
    # the client and the output of verbs
    "PREFIXD_API_KEY",
    "PREFIXD_JSON",
    "PREFIXD_TIMEOUT",
    "PREFIXD_URL",
    # docker-compose.yml
    "PREFIXD_MEMORY",
    "PREFIXD_PUBLISHED_PORT",
    "PREFIXD_TARGET",
    # tests and benchmarks
    "PREFIXD_CACHE_DIR",
    "PREFIXD_DEMO_MODELS",
    "PREFIXD_KILLS",
    "PREFIXD_KILL_SEED",
    "PREFIXD_SOAK_SECONDS",
    "PREFIXD_SOAK_SEED",
)

_FOREIGN = ("PREFIXD_TEST_", "PREFIXD_SERVICE_", "PREFIXD_PORT")
"""Beginnings of names that others set: our tests, and Kubernetes for a service named prefixd."""

_REMOVED = frozenset(name for variables in REMOVED_VARIABLES.values() for name in variables)
"""Their verbs fail and name what replaced them."""


def known_variables() -> list[str]:
    """The variables that prefixd reads, those of its tests by prefix excepted."""
    settings = [f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields]
    return sorted([*settings, *_OTHER_VARIABLES])


def unknown_variables(names: Iterable[str]) -> dict[str, str]:
    """Those of ``names`` that begin as ours do and that nothing reads, each with the nearest known
    one. Upper and lower case are the same, as for settings."""
    known = known_variables()
    return {
        name: _nearest(name, known)
        for name in sorted(names)
        if (upper := name.upper()).startswith(ENV_PREFIX)
        and upper not in known
        and upper not in _REMOVED
        and not upper.startswith(_FOREIGN)
    }


def _nearest(name: str, known: list[str]) -> str:
    return get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]


def unknown_variables_warning() -> str | None:
    """One line about the variables of this process that nothing reads; None when there is none."""
    unknown = unknown_variables(os.environ)
    if not unknown:
        return None
    listed = ", ".join(f"{name} (nearest: {nearest})" for name, nearest in unknown.items())
    return f"ignored, because no such variable is known: {listed}"
