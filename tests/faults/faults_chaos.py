"""Traffic of several tenants with known answers, and what they saw while faults came and went.

Each write has its own name or user. One whose response was an error may have been applied or not,
and is not tracked; an acknowledged one must be there at the end.
"""

import asyncio
import hashlib
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2

from tests.faults.faults_model import TINY, Content
from tests.faults.faults_outage import REFUSED_WITHIN_S, within
from tests.faults.faults_reference import Reference
from tests.faults.faults_traffic import Answer, complete, greedy, in_parts, stream

COUNT = 16
"""Output tokens of each request."""

REFUSALS = frozenset({"storage_unavailable", "storage_full", "overloaded", "corrupt_prefix"})
ABSENT = "absent"
_KEPT = 40
"""Prefixes that a tenant keeps; older ones are deleted."""
_PAUSE_S = 0.25


@dataclass
class Report:
    """What all clients saw; ``answers`` by kind of prefix. ``standing`` names the faults that stand
    or stood last; ``broken`` is true while connections may break."""

    answers: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    standing: str = "none"
    broken: bool = False
    over: bool = False


@dataclass
class Tenant:
    """One tenant's clients: readers that compare answers, and a writer.

    ``contents`` are its prefixes by name, uploaded by ``prepare``; ``acknowledged`` has the digest
    of each prefix that the writer uploaded, or ABSENT, and the reference of each user;
    ``unverified`` are those of them since the last ``verify``.
    """

    name: str
    http: httpx2.AsyncClient
    contents: dict[str, Content]
    reference: Reference
    report: Report
    rng: random.Random
    acknowledged: dict[str, str] = field(default_factory=dict)
    unverified: set[str] = field(default_factory=set)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def prepare(self) -> None:
        for name, content in self.contents.items():
            response = await self.http.put(f"/v1/prefixes/{name}", **content.body())
            assert response.status_code in {200, 201}, response.text

    async def read(self) -> None:
        """Generate under one prefix after the other until the run is over."""
        while not self.report.over:
            await self.generate(self.rng.choice([None, *self.contents]))

    async def write(self) -> None:
        """Upload, bind and delete until the run is over."""
        while not self.report.over:
            await self.change(self.rng.random())
            await asyncio.sleep(_PAUSE_S)

    async def generate(self, name: str | None) -> bool:
        """One request under the prefix ``name``, or the base; whether it was answered."""
        prompt = self.rng.randrange(len(self.reference.prompts))
        body = greedy(name or TINY, self.reference.prompts[prompt], COUNT)
        content = None if name is None else self.contents[name]
        if content is not None and content.kind == "soft" and self.rng.random() < 0.5:
            body, content = in_parts(body, content), content.in_parts
        send = self.rng.choice((complete, stream))
        started = time.monotonic()
        try:
            answer = await send(self.http, body)
        except httpx2.TransportError as error:
            self._disconnected(repr(error))
            return False
        if not answer.ok:
            self._refused(answer, time.monotonic() - started)
            return False
        if not self.reference.agrees(content, prompt, answer.tokens, count=COUNT):
            self.report.wrong.append(f"{self.name} {name} {prompt}: {answer}")
        self.report.answers["base" if content is None else content.kind] += 1
        return True

    async def change(self, kind: float) -> bool:
        """One write; whether it was acknowledged."""
        number = next(self._numbers)
        stored = [what for what, state in self.acknowledged.items() if "/" in state]
        prefixes = [what for what, state in self.acknowledged.items() if len(state) == 64]
        if len(prefixes) > _KEPT and kind < 0.5:
            return await self._send("DELETE", f"/v1/prefixes/{prefixes[0]}", prefixes[0], ABSENT)
        if prefixes and kind > 0.7 and len(stored) < 4 * _KEPT:
            user = f"user-{number}"
            reference = self.rng.choice(list(self.contents))
            path = f"/v1/users/{user}/prefix"
            return await self._send("PUT", path, user, f"/{reference}", json={"prefix": reference})
        name = f"w{number}"
        text = " ".join(f"w{self.rng.randrange(3, 200)}" for _ in range(9))
        body = {"kind": "text", "text": text}
        return await self._send("PUT", f"/v1/prefixes/{name}", name, "", json=body)

    async def verify_all(self) -> None:
        """Compare everything acknowledged with what the server has."""
        self.unverified = set(self.acknowledged)
        await self.verify()

    async def verify(self) -> None:
        """Compare what was acknowledged since the last time with what the server has."""
        verified, self.unverified = self.unverified, set()
        for what in sorted(verified):
            state = self.acknowledged.get(what)
            if state is None:
                continue  # the writer is changing it
            user = state.startswith("/")
            path = f"/v1/users/{what}/prefix" if user else f"/v1/prefixes/{what}"
            response = await self.http.get(path)
            if self.acknowledged.get(what) != state:
                continue
            received = ABSENT if response.status_code == 404 else str(response.status_code)
            if response.status_code == 200:
                shown = response.json()
                received = f"/{shown['prefix']}" if user else shown["digest"]
            if received != state:
                self.report.lost.append(f"{self.name} {what}: {state}, now {received}")
        for what, digest in self._sample():
            response = await self.http.get(f"/v1/prefixes/{what}/versions/1/content")
            if hashlib.sha256(response.content).hexdigest() != digest:
                self.report.lost.append(f"{self.name} {what}: {response.status_code}")

    def _sample(self) -> list[tuple[str, str]]:
        stored = [item for item in self.acknowledged.items() if len(item[1]) == 64]
        return stored[-5:]  # not those that the writer deletes next

    async def _send(self, method: str, path: str, what: str, state: str, **content: object) -> bool:
        """Send a change; ``state`` is empty where the response tells it."""
        self.acknowledged.pop(what, None)  # until it is acknowledged either may hold
        started = time.monotonic()
        try:
            response = await self.http.request(method, path, **content)  # type: ignore[arg-type]
        except httpx2.TransportError as error:
            self._disconnected(repr(error))
            return False
        parsed = response.json() if response.content else {}
        if response.status_code >= 300:
            answer = Answer(response.status_code, error=parsed["error"])
            self._refused(answer, time.monotonic() - started)
            return False
        self.acknowledged[what] = state or parsed["digest"]
        self.unverified.add(what)
        self.report.writes += 1
        return True

    def _refused(self, answer: Answer, seconds: float) -> None:
        self.report.refusals[str(answer.code)] += 1
        if answer.code not in REFUSALS or any(answer.texts):
            self.report.defects.append(f"{self.report.standing}: {self.name}: {answer}")
        if seconds > within(REFUSED_WITHIN_S):
            late = f"{self.report.standing}: {self.name}: refused after {seconds:.1f} s: {answer}"
            self.report.defects.append(late)

    def _disconnected(self, error: str) -> None:
        self.report.refusals["disconnected"] += 1
        if not self.report.broken:
            self.report.defects.append(f"{self.report.standing}: {self.name}: {error}")
