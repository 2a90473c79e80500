"""prefixd: the multi-tenant inference server with swappable prefixes."""

from importlib import metadata


def version() -> str:
    """The version of the installed package, as pyproject.toml names it; "0" for a checkout that is
    not installed."""
    try:
        return metadata.version("prefixd")
    except metadata.PackageNotFoundError:
        return "0"
