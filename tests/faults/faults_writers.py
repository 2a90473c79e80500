"""Clients that write, and a record of acknowledged changes, which must survive a restart.

Each writer has its own names and users, so the state of each changes in a known order: after a
kill it is the last acknowledged state, or that of the one pending change.
"""

import hashlib
import random
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.faults.faults_model import MAX_TOKENS, Content
from tests.faults.faults_reference import Reference
from tests.faults.faults_traffic import greedy, stream

ABSENT = "absent"


@dataclass
class AcknowledgedState:
    """Acknowledged changes. ``open`` has the states that one pending change may have made."""

    state: dict[tuple[str, str], Hashable] = field(default_factory=dict)
    open: dict[tuple[str, str], Hashable] = field(default_factory=dict)
    versions: dict[tuple[str, int], tuple[str, Content]] = field(default_factory=dict)
    count: int = 0

    def begin(self, what: tuple[str, str], state: Hashable) -> None:
        """Record a change before it is sent."""
        self.open[what] = state

    def acknowledge(self, what: tuple[str, str], state: Hashable) -> None:
        """Record that the server acknowledged the change."""
        self.state[what] = state
        del self.open[what]
        self.count += 1

    def possible(self, what: tuple[str, str]) -> set[Hashable]:
        """The possible states of ``what`` after a restart."""
        states = {self.state.get(what, ABSENT)}
        return states | {self.open[what]} if what in self.open else states

    def observe(self, what: tuple[str, str], state: Hashable) -> None:
        """Record the state that was read after a restart."""
        self.open.pop(what, None)
        self.state[what] = state


@dataclass
class Writer:
    """Uploads, aliases and bindings, one change after another, until the server stops."""

    number: int
    acknowledged: AcknowledgedState
    seed: str
    round: int

    async def write(self, http: httpx2.AsyncClient) -> None:
        """Write until the connection breaks or the server reports that it is shutting down."""
        rng = random.Random(f"{self.seed}:{self.number}:{self.round}")
        name, user = f"w{self.number}", f"user-{self.number}"
        try:
            for step in range(10_000):
                kind = rng.random()
                versions = sorted(v for n, v in self.acknowledged.versions if n == name)
                if kind < 0.5 or not versions:
                    content = Content(
                        rng.choice(("text", "soft", "kv")),
                        rng.randint(1, 40),
                        self.number * 1_000_000 + self.round * 10_000 + step,
                    )
                    await self._upload(http, name, content)
                elif kind < 0.75:
                    alias, version = ("prefixes", f"{name}@prod"), rng.choice(versions)
                    self.acknowledged.begin(alias, version)
                    path = f"/v1/prefixes/{name}/aliases/prod"
                    _ok(await http.put(path, json={"version": version}))
                    self.acknowledged.acknowledge(alias, version)
                else:
                    reference = f"{name}@{rng.choice(versions)}"
                    self.acknowledged.begin(("users", user), reference)
                    _ok(await http.put(f"/v1/users/{user}/prefix", json={"prefix": reference}))
                    self.acknowledged.acknowledge(("users", user), reference)
        except (httpx2.TransportError, ShuttingDown):
            return

    async def _upload(self, http: httpx2.AsyncClient, name: str, content: Content) -> None:
        latest = ("prefixes", name)
        self.acknowledged.begin(latest, content)
        response = await http.put(f"/v1/prefixes/{name}", **content.body())
        manifest = _ok(response)
        self.acknowledged.versions[name, manifest["version"]] = (manifest["digest"], content)
        self.acknowledged.acknowledge(latest, content)


class ShuttingDown(Exception):
    """The server accepts no more requests."""


def _ok(response: httpx2.Response) -> dict[str, Any]:
    parsed: dict[str, Any] = response.json()
    if response.status_code == 503:
        raise ShuttingDown
    assert response.status_code in {200, 201}, response.text
    return parsed


async def check(
    http: httpx2.AsyncClient,
    acknowledged: AcknowledgedState,
    reference: Reference,
    rng: random.Random,
) -> None:
    """Compare a restarted server with ``acknowledged``, and generate with some of its prefixes."""
    for (name, version), (digest, _) in acknowledged.versions.items():
        manifest = (await http.get(f"/v1/prefixes/{name}@{version}")).json()
        assert manifest.get("digest") == digest, (name, version, manifest)
    by_digest = dict(acknowledged.versions.values())
    for kind, what in {*acknowledged.state, *acknowledged.open}:
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
                state = by_digest.get(shown["digest"]) or await _unacknowledged(
                    http, acknowledged, what, shown
                )
        assert state in acknowledged.possible((kind, what)), (
            what,
            state,
            acknowledged.possible((kind, what)),
        )
        acknowledged.observe((kind, what), state)
    versions = sorted(acknowledged.versions)
    for name, version in rng.sample(versions, min(6, len(versions))):
        digest, content = acknowledged.versions[name, version]
        stored = await http.get(f"/v1/prefixes/{name}/versions/{version}/content")
        assert hashlib.sha256(stored.content).hexdigest() == digest
        prompt = rng.randrange(len(reference.prompts))
        body = greedy(f"{name}@{version}", reference.prompts[prompt], MAX_TOKENS)
        answer = await stream(http, body)
        assert answer.ok, answer
        assert reference.agrees(content, prompt, answer.tokens, count=MAX_TOKENS), (content, answer)


async def _unacknowledged(
    http: httpx2.AsyncClient, acknowledged: AcknowledgedState, name: str, shown: dict[str, Any]
) -> Hashable:
    """The pending upload, which was stored but whose response did not arrive."""
    content = acknowledged.open.get(("prefixes", name))
    assert isinstance(content, Content), f"{name} is {shown}, which was not uploaded"
    again = await http.put(f"/v1/prefixes/{name}", **content.body())
    assert (again.status_code, again.json()["digest"]) == (200, shown["digest"]), again.text
    acknowledged.versions[name, shown["version"]] = (shown["digest"], content)
    return content
