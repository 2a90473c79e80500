"""The stacks that a server runs on, and what fails in each."""

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from prefixd.server.tenants.registry import Tenants
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from tests import faulty_bucket as buckets
from tests.faults.faults_clock import ServerClock
from tests.faults.faults_disk import MIB, small_disk
from tests.faults.faults_injections import (
    connections,
    dribblers,
    locked_catalog,
    paused_postgres,
    stalled_readers,
)
from tests.faults.faults_model import TINY, make_prompts
from tests.faults.faults_traffic import greedy
from tests.real_services import make_bucket, running_postgres

NAMES = ("acme", "beta", "crow", "dove")
PROMPTS = make_prompts(4, lengths=(1, 9, 24), seed=8)
HOUR_S = 3600
QUOTA = {
    "requests_per_minute": 100_000,
    "tokens_per_minute": 100_000_000,
    "max_concurrent_requests": 200,
}
CROWD = ("127.0.0.2", "127.0.0.3")
"""The addresses of bad clients."""


@dataclass(frozen=True)
class Fault:
    """``component`` is what fails: two faults of one do not stand at once."""

    name: str
    component: str
    stand: Callable[[], AbstractContextManager[Any]]


@dataclass
class Stack:
    """A catalog and a blob store, with the flags of a server on them and their own faults."""

    name: str
    data: Path
    flags: tuple[str, ...]
    database_url: str
    clock: ServerClock
    faults: list[Fault] = field(default_factory=list)
    keys: dict[str, str] = field(default_factory=dict)

    def make_keys(self) -> None:
        engine = open_database(self.database_url)
        upgrade(engine)
        tenants = Tenants(engine)
        for name in NAMES:
            tenants.create_tenant(name, quota=QUOTA)
            self.keys[name] = tenants.create_key(tenant=name).text
        engine.dispose()

    def client_faults(self, url: str) -> list[Fault]:
        """The faults of the clock and of other clients."""
        body = greedy(TINY, PROMPTS[0], 200, n=8)
        return [
            Fault("clock back", "clock", lambda: self._clock_set(-HOUR_S)),
            Fault("clock forward", "clock", lambda: self._clock_set(HOUR_S)),
            Fault(
                "idle connections",
                "connections",
                lambda: connections(url, sources=CROWD[:1], each=150, sent=b""),
            ),
            Fault(
                "dribbling writers", "writers", lambda: dribblers(url, source=CROWD[0], count=30)
            ),
            Fault(
                "stalled readers",
                "readers",
                lambda: stalled_readers(
                    url, source=CROWD[1], key=self.keys["dove"], body=body, count=3
                ),
            ),
        ]

    @contextmanager
    def _clock_set(self, offset_s: float) -> Iterator[None]:
        self.clock.set(offset_s)
        yield
        self.clock.set(0)


@contextmanager
def embedded(root: Path, clock: ServerClock) -> Iterator[Stack]:
    """SQLite and files on a small disk."""
    with small_disk(root / "disk", size=96 * MIB) as disk:
        data = disk.root / "data"
        data.mkdir()
        file = data / "catalog.sqlite3"
        stack = Stack("SQLite and files", data, (), f"sqlite:///{file}", clock)
        stack.faults = [
            Fault("SQLite locked", "catalog", lambda: locked_catalog(file)),
            Fault("disk full", "disk", lambda: standing(disk.fill, disk.free)),
        ]
        yield stack


@contextmanager
def shared(
    root: Path, clock: ServerClock, s3_endpoint: str, environment: pytest.MonkeyPatch
) -> Iterator[Stack]:
    """PostgreSQL and a bucket, with the data folder on a small disk."""
    make_bucket(s3_endpoint, "chaos")
    with (
        small_disk(root / "disk2", size=96 * MIB) as disk,
        running_postgres() as postgres,
        buckets.faulty_bucket(s3_endpoint) as bucket,
    ):
        environment.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        data = disk.root / "data"
        data.mkdir()
        url, blobs = f"{postgres.url}postgres", "s3://chaos/prefixes"
        flags = ("--database-url", url, "--blobs-url", blobs)
        stack = Stack("PostgreSQL and bucket", data, flags, url, clock)

        def bucket_fault(fault: buckets.Fault) -> AbstractContextManager[None]:
            return standing(
                lambda: setattr(bucket, "fault", fault),
                lambda: setattr(bucket, "fault", buckets.Fault.NONE),
            )

        stack.faults = [
            Fault("PostgreSQL paused", "catalog", lambda: paused_postgres(postgres.port)),
            Fault("disk full", "disk", lambda: standing(disk.fill, disk.free)),
            Fault("bucket hangs", "bucket", lambda: bucket_fault(buckets.Fault.HANG)),
            Fault("bucket slow", "bucket", lambda: bucket_fault(buckets.Fault.SLOW)),
            Fault("bucket 503", "bucket", lambda: bucket_fault(buckets.Fault.UNAVAILABLE)),
            Fault("bucket cuts bodies", "bucket", lambda: bucket_fault(buckets.Fault.CUT_RESPONSE)),
        ]
        yield stack


@contextmanager
def standing(begin: Callable[[], None], end: Callable[[], None]) -> Iterator[None]:
    begin()
    try:
        yield
    finally:
        end()


def plan(faults: list[Fault], rng: random.Random) -> Iterator[tuple[Fault, ...]]:
    """Every fault alone, then every pair of different components, in the seed's order, again and
    again."""
    pairs = [pair for pair in combinations(faults, 2) if pair[0].component != pair[1].component]
    while True:
        rng.shuffle(faults)
        yield from [(fault,) for fault in faults]
        rng.shuffle(pairs)
        yield from pairs
