"""A catalog of a million answers as fast as one of a thousand, on both databases."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from prefixd.server.tenants.bindings import Bindings, ChosenBy
from prefixd.store.blobs.blobs import open_blobs
from prefixd.store.db.database import open_database, writing
from prefixd.store.db.migrate import upgrade
from prefixd.store.store import PrefixStore
from tests.real_services import Postgres
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home

FEW, MANY = 1_000, 1_000_000
LIMIT = 1.5
TRIES = 4

_NUMBERS = {
    "sqlite": "WITH RECURSIVE numbers(n) AS "
    "(SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)",
    "postgresql": "WITH numbers AS (SELECT generate_series(1, :count) AS n)",
}
_PADDED = {
    "sqlite": ("printf('%07d', n)", "printf('%064d', n)"),
    "postgresql": ("lpad(n::text, 7, '0')", "lpad(n::text, 64, '0')"),
}
_ROWS = {
    "prefixes (id, tenant, name, next_version)": "n, 'acme', 'p' || {short}, 2",
    "blobs (tenant, digest, size_bytes)": "'acme', {long}, 100",
    "versions (prefix_id, version, tenant, digest, fingerprint, kind, num_virtual_tokens, "
    "size_bytes, metadata_json, created_at)": (
        "n, 1, 'acme', {long}, '"
        + BASE.fingerprint
        + "', 'hard_prompt', 9, 100, '{{}}', '2026-01-01 00:00:00'{cast}"
    ),
    "latest_versions (prefix_id, fingerprint, version)": f"n, '{BASE.fingerprint}', 1",
    "aliases (prefix_id, alias, version)": "n, 'prod', 1",
    "bindings (tenant, user_id, reference, updated_at)": (
        "'acme', 'u' || {short}, 'p' || {short} || '@prod', '2026-01-01 00:00:00'{cast}"
    ),
}


def fill(engine: Engine, count: int) -> None:
    """``count`` prefixes, with an alias each, and as many bindings, by plain SQL."""
    upgrade(engine)
    dialect = engine.dialect.name
    short, long = _PADDED[dialect]
    cast = "::timestamp" if dialect == "postgresql" else ""
    with writing(engine) as connection:
        if dialect == "postgresql":  # foreign keys hold by construction: to check them takes long
            connection.execute(text("SET LOCAL session_replication_role = replica"))
        connection.execute(
            text("INSERT INTO tenants (name, created_at) VALUES ('acme', '2026-01-01 00:00:00')")
        )
        for columns, values in _ROWS.items():
            selected = values.format(short=short, long=long, cast=cast)
            insert = f"INSERT INTO {columns} {_NUMBERS[dialect]} SELECT {selected} FROM numbers"
            if dialect == "sqlite":
                insert = f"{_NUMBERS[dialect]} INSERT INTO {columns} SELECT {selected} FROM numbers"
            connection.execute(text(insert), {"count": count})
    with writing(engine) as connection:
        connection.execute(text("ANALYZE"))


class Catalog:
    """A catalog of ``count``, and the questions whose time is compared."""

    def __init__(self, url: str, root: Path, count: int) -> None:
        self.url = url
        self.engine = open_database(url)
        fill(self.engine, count)
        self.names = random.Random(7)
        self.count = count
        self.store = PrefixStore(self.engine, open_blobs(None, root))
        self.bindings = Bindings(self.engine)

    def number(self) -> str:
        return f"{self.names.randint(1, self.count):07d}"

    def by_alias(self) -> None:
        name = f"p{self.number()}"
        assert self.store.resolve(tenant="acme", reference=f"{name}@prod", base=BASE).name == name

    def by_latest(self) -> None:
        name = f"p{self.number()}"
        assert self.store.resolve(tenant="acme", reference=name, base=BASE).name == name

    def by_user(self) -> None:
        number = self.number()
        chosen = self.bindings.chosen("acme", f"u{number}")
        assert chosen == (f"p{number}@prod", ChosenBy.USER)

    def a_page(self) -> None:
        after = f"p{self.names.randint(0, self.count - 20):07d}"
        page = self.store.list(tenant="acme", base=BASE, limit=20, after=after)
        assert (len(page.manifests), page.manifests[0].name > after) == (20, True)

    def a_start(self) -> None:
        engine = open_database(self.url)
        upgrade(engine)
        PrefixStore(engine, open_blobs(None, Path(self.store._blobs._root).parent))  # type: ignore[attr-defined]
        engine.dispose()

    def a_sweep(self) -> None:
        assert self.store.collect().blobs == 0


ASKED: dict[str, tuple[Callable[[Catalog], None], int]] = {
    "resolve an alias": (Catalog.by_alias, 300),
    "resolve latest": (Catalog.by_latest, 300),
    "look a user up": (Catalog.by_user, 300),
    "list a page": (Catalog.a_page, 60),
    "start": (Catalog.a_start, 30),
    "sweep": (Catalog.a_sweep, 30),
}


@pytest.fixture(params=["sqlite", "postgresql"])
def catalogs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Catalog, Catalog]]:
    """One of a thousand and one of a million."""
    urls = [f"sqlite:///{tmp_path}/{count}.sqlite" for count in (FEW, MANY)]
    server: Postgres | None = None
    if request.param == "postgresql":
        server = request.getfixturevalue("postgres_server")
        for name in ("few", "many"):
            server.execute(f"CREATE DATABASE {name}")
        urls = [server.url + name for name in ("few", "many")]
    made = [
        Catalog(url, tmp_path / str(count), count)
        for url, count in zip(urls, (FEW, MANY), strict=True)
    ]
    yield made[0], made[1]
    for one in made:
        one.engine.dispose()
    if server is not None:
        for name in ("few", "many"):
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.serial
@pytest.mark.timeout(900)
def test_queries_on_a_million_prefixes_take_as_long_as_on_a_thousand(
    catalogs: tuple[Catalog, Catalog],
) -> None:
    """What grows with the catalog is slower every time; what another program made slower is not."""
    ratios = {name: [ratio(*asked, catalogs)] for name, asked in ASKED.items()}
    for name, measured in ratios.items():
        while measured[-1] >= LIMIT and len(measured) < TRIES:
            measured.append(ratio(*ASKED[name], catalogs))
    assert max(map(min, ratios.values())) < LIMIT, ratios


def test_reading_a_version_takes_time_linear_in_its_aliases(home: Home) -> None:
    def seconds(name: str, count: int) -> float:
        home.put_text("text", name)
        names = [{"alias": f"a{number}", "name": name} for number in range(count)]
        with writing(home.database) as connection:
            connection.execute(
                text(
                    "INSERT INTO aliases (prefix_id, alias, version) "
                    "SELECT id, :alias, 1 FROM prefixes WHERE name = :name"
                ),
                names,
            )
        taken = []
        for _ in range(3):
            began = time.thread_time()  # of this thread, independent of other load
            manifest = home.store.resolve(tenant="acme", reference=name, base=BASE)
            taken.append(time.thread_time() - began)
            assert len(manifest.aliases) == count + 1
        return min(taken)

    few, many = seconds("few", 2_500), seconds("many", 40_000)
    assert many / few < 3 * 16


def ratio(ask: Callable[[Catalog], None], times: int, catalogs: tuple[Catalog, Catalog]) -> float:
    """How many times longer the large catalog takes than the small one."""
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(times + 10):
        # Alternating, so that other load affects both.
        for catalog, seconds in zip(catalogs, taken, strict=True):
            began = time.perf_counter()
            ask(catalog)
            if turn >= 10:
                seconds.append(time.perf_counter() - began)
    few, many = (statistics.median(seconds) for seconds in taken)
    return round(many / few, 2)
