"""prefixd: the multi-tenant inference server with swappable prefixes."""

import os
from importlib import metadata

# OpenMP and OpenBLAS read these when torch and numpy are imported, which every module of this
# package does later. A server shares its cores: threads that spin without limit make a step up to
# 20 times slower next to one busy process, and threads that sleep at once need a wake-up for every
# operation. numpy multiplies no matrices here, so its threads would only take memory.
for _name, _value in {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "10000",
    "OPENBLAS_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)


def version() -> str:
    """The version of the installed package, as pyproject.toml names it; "0" for a checkout that is
    not installed."""
    try:
        return metadata.version("prefixd")
    except metadata.PackageNotFoundError:
        return "0"
