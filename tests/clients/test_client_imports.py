"""The client is light: a program that imports it loads neither the server nor its libraries."""

import subprocess
import sys

PROGRAM = """
import sys
from prefixd.client import AsyncClient, Client
heavy = {"torch", "transformers", "fastapi", "starlette", "sqlalchemy", "numpy", "typer", "rich"}
print(sorted(heavy & sys.modules.keys()))
print(sorted({".".join(name.split(".")[:2]) for name in sys.modules if name[:7] == "prefixd"}))
"""


def test_importing_the_client_loads_no_server_library_and_no_other_package_of_ours():
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed == "[]\n['prefixd', 'prefixd.client']\n"
