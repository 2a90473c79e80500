"""prefixd: the multi-tenant inference server with swappable prefixes."""

__version__ = "0.1.0"
