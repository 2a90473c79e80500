"""Real services for the tests that need them: started once in a run, empty for each test.

They are imported where they are started: `make gpu-check` runs some of the tests on machines that
have torch and no database driver.
"""

import gc
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.real_services import Postgres

# A busy machine may pause during any example, or be slow in all of them.
settings.register_profile("prefixd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("prefixd")

_number = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without searches for garbage: what collection makes stays until the end. Searches
    during the tests pass over it too."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator["Postgres"]:
    """A running PostgreSQL."""
    from tests.real_services import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: "Postgres") -> Iterator[str]:
    """The SQLAlchemy URL of a fresh, empty database."""
    name = f"test_{next(_number)}"
    postgres_server.execute(f"CREATE DATABASE {name}")
    yield postgres_server.url + name
    postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def migrated_database(postgres_server: "Postgres") -> str:
    """The name of a database with the tables of this version, to make others from."""
    from prefixd.store.db.database import open_database
    from prefixd.store.db.migrate import upgrade

    postgres_server.execute("CREATE DATABASE migrated")
    engine = open_database(f"{postgres_server.url}migrated")
    upgrade(engine)
    engine.dispose()  # no connection: others could not be made from it
    return "migrated"


@pytest.fixture
def postgres_catalog_url(postgres_server: "Postgres", migrated_database: str) -> Iterator[str]:
    """As ``postgres_url``, of a database with the tables of this version."""
    name = f"test_{next(_number)}"
    postgres_server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated_database}")
    yield postgres_server.url + name
    postgres_server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The endpoint of a running S3."""
    from tests.real_services import running_s3

    with running_s3() as endpoint:
        yield endpoint


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The blobs URL of a fresh, empty bucket; the environment leads to its endpoint."""
    from tests.real_services import S3_ENVIRONMENT, make_bucket

    for variable, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(variable, value)
    name = f"bucket-{next(_number)}"
    make_bucket(s3_endpoint, name)
    return f"s3://{name}/prefixes"
