"""Clients that write, and a book of what was acknowledged: what a restart must bring back.

Each writer owns its names and users, so what is stored under one changes in a known order: the
last acknowledged state, or that of the one change that was under way when the server died.
"""

import hashlib
import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.faults.faults_model import MOST_TOKENS, Content, Oracle
from tests.faults.faults_traffic import greedy, stream

ABSENT = "absent"


@dataclass
class Book:
    """What the server said yes to. ``open`` are states that one change under way may have made."""

    state: dict[tuple[str, str], Hashable] = field(default_factory=dict)
    open: dict[tuple[str, str], Hashable] = field(default_factory=dict)
    versions: dict[tuple[str, int], tuple[str, Content]] = field(default_factory=dict)
    acknowledged: int = 0

    def begin(self, what: tuple[str, str], state: Hashable) -> None:
        """A change is about to be sent."""
        self.open[what] = state

    def acknowledge(self, what: tuple[str, str], state: Hashable) -> None:
        """The server said yes."""
        self.state[what] = state
        del self.open[what]
        self.acknowledged += 1

    def possible(self, what: tuple[str, str]) -> set[Hashable]:
        """States in which ``what`` may be found."""
        found = {self.state.get(what, ABSENT)}
        return found | {self.open[what]} if what in self.open else found

    def found(self, what: tuple[str, str], state: Hashable) -> None:
        """After a restart: what it is from now on."""
        self.open.pop(what, None)
        self.state[what] = state


@dataclass
class Writer:
    """Uploads, names and binds, one change after another, until the server is gone."""

    number: int
    book: Book
    seed: str
    round: int

    async def write(self, http: httpx2.AsyncClient) -> None:
        """Go on until the connection breaks or the server says that it is shutting down."""
        rng = random.Random(f"{self.seed}:{self.number}:{self.round}")
        name, user = f"w{self.number}", f"user-{self.number}"
        try:
            for step in range(10_000):
                way = rng.random()
                known = sorted(v for n, v in self.book.versions if n == name)
                if way < 0.5 or not known:
                    content = Content(
                        rng.choice(("text", "soft", "kv")),
                        rng.randint(1, 40),
                        self.number * 1_000_000 + self.round * 10_000 + step,
                    )
                    await self._upload(http, name, content)
                elif way < 0.75:
                    alias, version = ("prefixes", f"{name}@prod"), rng.choice(known)
                    self.book.begin(alias, version)
                    path = f"/v1/prefixes/{name}/aliases/prod"
                    _ok(await http.put(path, json={"version": version}))
                    self.book.acknowledge(alias, version)
                else:
                    reference = f"{name}@{rng.choice(known)}"
                    self.book.begin(("users", user), reference)
                    _ok(await http.put(f"/v1/users/{user}/prefix", json={"prefix": reference}))
                    self.book.acknowledge(("users", user), reference)
        except (httpx2.TransportError, ShuttingDown):
            return

    async def _upload(self, http: httpx2.AsyncClient, name: str, content: Content) -> None:
        latest = ("prefixes", name)
        self.book.begin(latest, content)
        response = await http.put(f"/v1/prefixes/{name}", **content.body())
        manifest = _ok(response)
        self.book.versions[name, manifest["version"]] = (manifest["digest"], content)
        self.book.acknowledge(latest, content)


class ShuttingDown(Exception):
    """The server takes no more."""


def _ok(response: httpx2.Response) -> dict[str, Any]:
    parsed: dict[str, Any] = response.json()
    if response.status_code == 503:
        raise ShuttingDown
    assert response.status_code in {200, 201}, response.text
    return parsed


async def check(http: httpx2.AsyncClient, book: Book, oracle: Oracle, rng: random.Random) -> None:
    """Compare what a restarted server has with ``book``; some of it is asked to answer, too."""
    for (name, version), (digest, _) in book.versions.items():
        manifest = (await http.get(f"/v1/prefixes/{name}@{version}")).json()
        assert manifest.get("digest") == digest, (name, version, manifest)
    by_digest = dict(book.versions.values())
    for kind, what in {*book.state, *book.open}:
        path = f"/v1/users/{what}/prefix" if kind == "users" else f"/v1/prefixes/{what}"
        response = await http.get(path)
        assert response.status_code in {200, 404}, response.text
        state: Hashable = ABSENT
        if response.status_code == 200:
            shown = response.json()
            if kind == "users":
                state = shown["prefix"]
            elif "@" in what:
                state = shown["version"]
            else:
                state = by_digest.get(shown["digest"]) or await _unheard(http, book, what, shown)
        assert state in book.possible((kind, what)), (what, state, book.possible((kind, what)))
        book.found((kind, what), state)
    versions = sorted(book.versions)
    for name, version in rng.sample(versions, min(6, len(versions))):
        digest, content = book.versions[name, version]
        stored = await http.get(f"/v1/prefixes/{name}/versions/{version}/content")
        assert hashlib.sha256(stored.content).hexdigest() == digest
        prompt = rng.randrange(len(oracle.prompts))
        body = greedy(f"{name}@{version}", oracle.prompts[prompt], MOST_TOKENS)
        answer = await stream(http, body)
        assert answer.ok, answer
        assert oracle.agrees(content, prompt, answer.tokens, count=MOST_TOKENS), (content, answer)


async def _unheard(
    http: httpx2.AsyncClient, book: Book, name: str, shown: dict[str, Any]
) -> Hashable:
    """An upload that was stored, and whose yes did not arrive: it is the one under way."""
    content = book.open.get(("prefixes", name))
    assert isinstance(content, Content), f"{name} is {shown}, which nobody uploaded"
    again = await http.put(f"/v1/prefixes/{name}", **content.body())
    assert (again.status_code, again.json()["digest"]) == (200, shown["digest"]), again.text
    book.versions[name, shown["version"]] = (shown["digest"], content)
    return content
