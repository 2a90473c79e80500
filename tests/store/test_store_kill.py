"""A publish, a rollback or a delete of a version, killed at any system call; and the order in which
a publish makes things durable."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from prefixd.store.artifact.artifact import read_artifact
from prefixd.store.blobs.blobs import Blobs, open_blobs
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from prefixd.store.errors import UnknownPrefix
from prefixd.store.names import BlobKey
from prefixd.store.store import Manifest, PrefixStore
from tests.real_services import install
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_victim import CHANGES, HISTORY, MARKER, TEXT

KILLED = -signal.SIGKILL
HERE = Path(__file__).parent
OLD_TEXTS = ("first", "second", "third")
WRITING = {"write", "pwrite64", "fsync", "fdatasync", "unlink", "ftruncate"}
"""Calls that change the database, or print the acknowledgement."""
LATE = "the publish returns before all is durable"


@dataclass(frozen=True, slots=True)
class Call:
    """One line of a trace: the call, its arguments as printed, and the paths among them."""

    name: str
    arguments: str
    paths: tuple[Path, ...]

    @classmethod
    def read(cls, line: str) -> "Call | None":
        match = re.match(r"(\w+)\((.*)\) += [^-]", line)
        if match is None:
            return None
        found = re.findall(r'^\d+<([^>]*)>|(?:^|, )"(/[^"]*)"', match[2])
        return cls(match[1], match[2], tuple(Path(a or b) for a, b in found))


def mistakes(trace: list[Call]) -> list[str]:
    """What the order of a publish's calls would lose when the power fails."""
    found: list[str] = []
    unsynced: set[Path] = set()  # files written since their last fsync
    volatile: set[Path] = set()  # names made since their directory's last fsync
    linked = committed = False
    for call in trace:
        match call.name, call.paths:
            case "write" | "pwrite64", (path,) if (
                path.suffix == ".sqlite-wal" or ".tmp" in path.parts
            ):
                unsynced.add(path)
                if MARKER in call.arguments:
                    committed = True
                    if not linked:
                        found.append("the row is written before the blob")
                    elif volatile:
                        found.append("the row is written before the blob's name is durable")
            case "fsync" | "fdatasync", (path,):
                unsynced.discard(path)
                volatile = {name for name in volatile if name.parent != path}
            case "link" | "linkat", (source, target):
                linked = True
                volatile.add(target)
                if source in unsynced:
                    found.append("the blob gets its name before its bytes are durable")
            case "mkdir" | "mkdirat", (path,):
                volatile.add(path)
            case "write", _ if '"ack\\n"' in call.arguments:
                if not committed or unsynced or volatile:
                    found.append(LATE)
    return found


@dataclass
class Lab:
    """Runs publishes under strace, each on a fresh copy of one store."""

    folder: Path
    victims: "subprocess.Popen[str]"
    number: Iterator[int] = field(default_factory=itertools.count)

    def run(self, way: str, *options: str) -> tuple[Path, bool, int]:
        """One publish: its folder, whether it was acknowledged, and how its process ended."""
        home = self.folder / f"home-{next(self.number)}"
        shutil.copytree(self.folder / "template", home)
        self.say(f"{way} {home}")
        command = ["strace", "-p", self.hear(), "-o", f"{home}/trace", "-y", "-s", "100000"]
        tracer = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        with tracer, tracer.stderr:
            attached = tracer.stderr.readline()
            if "ptrace" in attached:  # as in a container without that right
                self.victims.kill()
                pytest.skip(f"tracing is not allowed here: {attached.strip()}")
            assert "attached" in attached, attached
            self.say("go")
            heard = [self.hear()]
            while not heard[-1].startswith("end "):
                heard.append(self.hear())
        return home, heard[0] == "ack", int(heard[-1].split()[1])

    def trace(self, way: str) -> list[Call]:
        home, acknowledged, ended = self.run(way)
        assert (acknowledged, ended) == (True, 0)
        lines = (home / "trace").read_text(errors="replace").splitlines()
        shutil.rmtree(home)
        return [call for call in map(Call.read, lines) if call is not None]

    def say(self, line: str) -> None:
        assert self.victims.stdin is not None
        self.victims.stdin.write(line + "\n")
        self.victims.stdin.flush()

    def hear(self) -> str:
        assert self.victims.stdout is not None
        return self.victims.stdout.readline().strip()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    install("strace", program="strace", otherwise=pytest.skip)
    folder = tmp_path_factory.mktemp("kill")
    with open_store(folder / "template") as store:
        publish(store, name="before", text="was there before")
        for text in OLD_TEXTS:
            publish(store, name=HISTORY, text=text)
    victims = subprocess.Popen(
        [sys.executable, HERE / "store_victim.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(HERE.parents[1]), "PYTHONHASHSEED": "0"},
        text=True,
    )
    with victims:
        yield Lab(folder, victims)
        assert victims.stdin is not None
        victims.stdin.close()


@dataclass(frozen=True, slots=True)
class Opened:
    """A store and its blobs."""

    store: PrefixStore
    blobs: Blobs
    engine: Engine


@contextmanager
def open_store(folder: Path) -> Iterator[Opened]:
    """The store on a folder, closed at the end of the block."""
    engine = open_database(f"sqlite:///{folder}/catalog.sqlite")
    upgrade(engine)
    blobs = open_blobs(None, folder)
    yield Opened(PrefixStore(engine, blobs), blobs, engine)
    engine.dispose()


def publish(opened: Opened, *, name: str = "style", text: str = TEXT) -> Manifest:
    published = changes.publish_text(
        opened.store,
        tenant="acme",
        name=name,
        text=text,
        metadata=None,
        base=BASE,
        count_tokens=len,
    )
    return published.manifest


def text_of(opened: Opened, reference: str) -> str | None:
    """The text behind a reference, complete and verified; None when there is no such version."""
    try:
        manifest = opened.store.resolve(tenant="acme", reference=reference, base=BASE)
    except UnknownPrefix:
        return None
    path = opened.store.fetch(tenant="acme", digest=manifest.digest)
    assert path.stat().st_size == manifest.size_bytes
    return read_artifact(path, base=BASE, count_tokens=len).text


@pytest.mark.slow
def test_a_publish_killed_at_any_system_call_leaves_its_version_absent_or_complete(
    lab: Lab,
) -> None:
    calls = Counter(call.name for call in lab.trace("sound"))
    points = present = 0
    for name in calls:
        for number in itertools.count(1):
            home, acknowledged, ended = lab.run(
                "sound", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}"
            )
            if ended == 0:  # there was no such call any more
                break
            assert ended == KILLED
            points += 1
            present += check_after_kill(home, acknowledged=acknowledged)
            shutil.rmtree(home)
    assert points >= sum(calls.values()) * 0.9
    assert 0 < present < points


def check_after_kill(home: Path, *, acknowledged: bool) -> bool:
    """Open the store after a killed publish; returns whether its version exists."""
    with open_store(home) as opened:
        assert text_of(opened, "before") == "was there before"
        found = text_of(opened, "style")
        assert found in ((TEXT,) if acknowledged else (TEXT, None))
        assert publish(opened).version == 1
        assert text_of(opened, "style") == TEXT
        opened.store.collect(grace=timedelta(seconds=-60), adopt=True)
        check_blobs(opened)
        opened.blobs.tidy(before=datetime.now(UTC) + timedelta(minutes=1))
        assert not list((home / "blobs" / ".tmp").iterdir())
    return found is not None


def check_blobs(opened: Opened) -> None:
    """Every version has its blob, and no other blob is left."""
    digests = {
        manifest.digest
        for latest in opened.store.list(tenant="acme").manifests
        for manifest in opened.store.versions(tenant="acme", name=latest.name)
    }
    assert {key for key, _ in opened.blobs.walk()} == {BlobKey("acme", one) for one in digests}


State = tuple[int, tuple[int, ...]]
"""The latest version of the changed prefix, and all of its versions."""

BEFORE: State = (3, (3, 2, 1))
AFTER: dict[str, State] = {"rollback": (1, (3, 2, 1)), "delete-version": (2, (2, 1))}


@pytest.mark.slow
@pytest.mark.parametrize("way", CHANGES)
def test_a_change_killed_at_any_writing_call_is_absent_or_complete(lab: Lab, way: str) -> None:
    calls = Counter(call.name for call in lab.trace(way) if call.name in WRITING)
    states: set[State] = set()
    points = 0
    for name, count in calls.items():
        for number in range(1, count + 1):
            inject = f"inject={name}:signal=KILL:when={number}"
            home, acknowledged, ended = lab.run(way, "-e", f"trace={name}", "-e", inject)
            points += ended == KILLED
            state = state_after_kill(home)
            assert state == AFTER[way] or (state == BEFORE and not acknowledged)
            states.add(state)
            shutil.rmtree(home)
    assert points >= sum(calls.values()) * 0.9
    assert states == {BEFORE, AFTER[way]}


def state_after_kill(home: Path) -> State:
    """The state after a killed change: every version is readable, and no reference dangles."""
    with open_store(home) as opened:
        with opened.engine.connect() as connection:
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []
        versions = [
            one.version for one in opened.store.versions(tenant="acme", name=HISTORY, base=BASE)
        ]
        for version in versions:
            assert text_of(opened, f"{HISTORY}@{version}") == OLD_TEXTS[version - 1]
        latest = opened.store.resolve(tenant="acme", reference=HISTORY, base=BASE)
        opened.store.collect(grace=timedelta(seconds=-60), adopt=True)
        check_blobs(opened)
        assert publish(opened, name=HISTORY, text="next").version == 4
    return latest.version, tuple(versions)


@pytest.mark.parametrize("way", ["sound", "stored-file"])
def test_a_publish_syncs_bytes_then_name_then_row(lab: Lab, way: str) -> None:
    assert mistakes(lab.trace(way)) == []


MUTANTS = {
    "no-file-fsync": {"the blob gets its name before its bytes are durable", LATE},
    "no-directory-fsync": {"the row is written before the blob's name is durable", LATE},
    "row-before-blob": {"the row is written before the blob"},
}


@pytest.mark.parametrize("way", MUTANTS)
def test_the_order_checker_detects_every_seeded_mistake(lab: Lab, way: str) -> None:
    assert set(mistakes(lab.trace(way))) == MUTANTS[way]
