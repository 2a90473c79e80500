"""``python -m prefixd.server`` is ``prefixd``."""

from prefixd.server.cli.main import main

main()
