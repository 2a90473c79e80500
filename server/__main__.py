"""``python -m server`` is ``prefixd``."""

from server.cli import main

main()
