"""Mixed traffic of many clients against one world, checked answer by answer.

Everything random comes from one seed. A client does one thing at a time; what it may find depends
on what others do at that moment, so the book keeps what was certain when a request was sent.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from prefixd.store.artifact.artifact import pack_peft, pack_text
from tests.faults.faults_model import MOST_TOKENS, Content, Oracle
from tests.faults.faults_runner import EXCEPTIONS, NANS, Fault, marked
from tests.faults.faults_traffic import Answer, caller, complete, greedy, stream
from tests.faults.faults_world import World

NAN_MESSAGE = "non-finite"
REFERENCES = tuple(f"p{i}" for i in range(6))


def digest_of(content: Content, scratch: Path) -> str:
    """The digest that the store will give an upload of ``content``."""
    body, target = content.body(), scratch / "packed"
    if content.kind == "text":
        return pack_text(body["json"]["text"], target).digest
    weights = scratch / "weights"
    weights.write_bytes(body["files"]["weights"][1])
    return pack_peft(body["files"]["config"][1], weights, target).digest


@dataclass
class Shelf:
    """One name of one tenant, as far as it is certain. ``deletions`` counts those begun."""

    present: bool = False
    deletions: int = 0
    versions: dict[int, Content] = field(default_factory=dict)
    alias: int | None = None
    alias_changes: int = 0


@dataclass
class Book:
    """What all clients of a world know together."""

    contents: list[Content]
    digests: dict[str, Content]
    shelves: dict[tuple[str, str], Shelf] = field(default_factory=dict)

    def shelf(self, tenant: str, name: str) -> Shelf:
        return self.shelves.setdefault((tenant, name), Shelf())


class Wrong(AssertionError):
    """Something must not be; the message says what and how to see it again."""


@dataclass
class Soak:
    """The clients of one world. ``numbers`` of requests must never come again as long as it lasts;
    ``happened`` counts outcomes."""

    world: World
    oracle: Oracle
    book: Book
    tenants: tuple[str, ...]
    seed: str
    numbers: Iterator[int]
    happened: Counter[str]

    async def run(self, *, clients: int, actions: int) -> None:
        """``clients`` at once, ``actions`` each."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                tenant = self.tenants[number % len(self.tenants)]
                group.create_task(self._client(f"{self.seed}:{number}", tenant, actions))

    async def _client(self, seed: str, tenant: str, actions: int) -> None:
        rng = random.Random(seed)
        async with caller(self.world.url, self.world.keys[tenant]) as http:
            for action in range(actions):
                one = _Client(self, http, tenant, rng)
                try:
                    await one.act()
                except Exception as error:
                    raise Wrong(f"seed {seed!r}, action {action}: {error!r}") from error


@dataclass
class _Client:
    soak: Soak
    http: httpx2.AsyncClient
    tenant: str
    rng: random.Random

    async def act(self) -> None:
        """One thing a client may do."""
        ways: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (70, self._generate),
            (8, self._leave),
            (8, self._upload),
            (4, self._move_alias),
            (2, self._drop_alias),
            (2, self._delete),
            (3, self._bind),
            (3, self._look),
        ]
        way = self.rng.choices([w for _, w in ways], [weight for weight, _ in ways])[0]
        await way()

    # -- generation ----

    async def _generate(self) -> None:
        number = next(self.soak.numbers)
        fault = self.rng.choice(list(Fault)) if self.rng.random() < 0.06 else None
        model, expect = self._model()
        prompt = self.rng.randrange(len(self.soak.oracle.prompts))
        body = self._body(model, prompt, marked(number, fault))
        certain = expect()
        asked = stream if self.rng.random() < 0.6 else complete
        answer = await asked(self.http, body)
        if answer.ok:
            self._check_tokens(answer, model, prompt, body)
            self._count("answered")
            if self._must_fail(fault, body):
                raise Wrong(f"a request marked {fault!r} was answered")
            return
        if answer.code == "deadline_exceeded" and "timeout" in body:
            self._count("too late")
        elif answer.status == 404 and not certain():
            self._count("absent")
        else:
            self._check_failure(answer, model, fault)

    def _body(self, model: str, prompt: int, seed: int) -> dict[str, Any]:
        count = self.rng.randint(1, MOST_TOKENS)
        more: dict[str, Any] = {"seed": seed}
        if self.rng.random() < 0.1:
            more["n"] = 2
        if self.rng.random() < 0.2:
            more["kv_reuse"] = False
        if self.rng.random() < 0.2:
            more["priority"] = self.rng.randint(-2, 2)
        if self.rng.random() < 0.1:
            more["timeout"] = self.rng.uniform(0.01, 0.5)
        if model == self.soak.world.base and self.rng.random() < 0.3:
            more["user"] = self.rng.choice(["ann", "bob"])
        return greedy(model, self.soak.oracle.prompts[prompt], count, **more)

    def _model(self) -> tuple[str, Callable[[], Callable[[], bool]]]:
        """What to call, and a question: is it certain that this exists? To be asked before the
        request is sent; the answer to be asked for after it came back."""
        if self.rng.random() < 0.15:
            return self.soak.world.base, lambda: lambda: False  # a user's prefix may be gone
        name = self.rng.choice(REFERENCES)
        shelf = self.soak.book.shelf(self.tenant, name)
        kind = self.rng.random()
        if kind < 0.3 and shelf.versions:
            version = self.rng.choice(sorted(shelf.versions))
            return f"{name}@{version}", lambda: self._stays(shelf, shelf.present)
        if kind < 0.6 and shelf.alias is not None:
            changes = shelf.alias_changes
            return f"{name}@prod", lambda: self._stays(shelf, shelf.present, changes)
        return name, lambda: self._stays(shelf, shelf.present)

    @staticmethod
    def _stays(shelf: Shelf, present: bool, changes: int | None = None) -> Callable[[], bool]:
        deletions = shelf.deletions
        return lambda: (
            present
            and shelf.deletions == deletions
            and (changes is None or shelf.alias_changes == changes)
        )

    def _check_tokens(self, answer: Answer, model: str, prompt: int, body: dict[str, Any]) -> None:
        content = None
        if answer.prefix is not None:
            content = self.soak.book.digests[answer.prefix["digest"]]
            self._check_version(answer.prefix, model)
        elif model != self.soak.world.base:
            raise Wrong(f"{model} was answered by the bare base")
        if not self.soak.oracle.agrees(content, prompt, answer.tokens, count=body["max_tokens"]):
            want = self.soak.oracle.answer(content, prompt)
            raise Wrong(f"{body} under {content}: expected {want}, got {answer}")
        if body.get("kv_reuse") is False and answer.cached:
            raise Wrong(f"{body} shared {answer.cached} tokens though it did not want to")

    def _check_version(self, used: dict[str, Any], model: str) -> None:
        name, _, version = model.partition("@")
        if model != self.soak.world.base and used["name"] != name:
            raise Wrong(f"{model} was answered by {used}")
        if version.isdigit() and used["version"] != int(version):
            raise Wrong(f"{model} was answered by {used}")
        shelf = self.soak.book.shelf(self.tenant, used["name"])
        known = shelf.versions.get(used["version"])
        if known is not None and self.soak.book.digests[used["digest"]] != known:
            raise Wrong(f"version {used} was uploaded as {known}")

    @staticmethod
    def _must_fail(fault: Fault | None, body: dict[str, Any]) -> bool:
        """Logits with NaN must be noticed. NaN in KV need not: before they are read, the sequence
        may have to start over, for want of blocks or with a failed step. Of exceptions, one
        that comes every time ends the request; after others it may be tried again."""
        later = fault is Fault.NAN_LOGITS and body["max_tokens"] > 1
        return later or fault in {Fault.NAN_PREFILL, Fault.RAISE}

    def _check_failure(self, answer: Answer, model: str, fault: Fault | None) -> None:
        if answer.status in {429, 503}:
            if answer.retry_after is None:
                raise Wrong(f"{answer} has no Retry-After")
            self._count("turned away")
        elif fault in NANS and NAN_MESSAGE in answer.message:
            self._count("NaN")
        elif fault in EXCEPTIONS and answer.code == "engine_error":
            self._count("raised")
        else:
            raise Wrong(f"{model}, marked {fault!r}: {answer}")

    async def _leave(self) -> None:
        """Ask, and hang up at some moment."""
        model, _ = self._model()
        prompt = self.rng.randrange(len(self.soak.oracle.prompts))
        body = self._body(model, prompt, marked(next(self.soak.numbers), None))
        if self.rng.random() < 0.5:
            await stream(self.http, body, leave_after=self.rng.randint(0, 4))
        else:
            asking = asyncio.ensure_future(complete(self.http, body))
            await asyncio.wait({asking}, timeout=self.rng.random() * 0.1)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        self._count("left")

    # -- prefixes and users ----

    async def _upload(self) -> None:
        name = self.rng.choice(REFERENCES)
        content = self.rng.choice(self.soak.book.contents)
        shelf = self.soak.book.shelf(self.tenant, name)
        deletions = shelf.deletions
        response = await self.http.put(f"/v1/prefixes/{name}", **content.body())
        self._expect(response, 200, 201)
        manifest = response.json()
        if self.soak.book.digests[manifest["digest"]] != content:
            raise Wrong(f"{content} was stored as {manifest}")
        if shelf.deletions == deletions:
            shelf.present = True
            shelf.versions[manifest["version"]] = content
        self._count("uploaded")

    async def _move_alias(self) -> None:
        name = self.rng.choice(REFERENCES)
        shelf = self.soak.book.shelf(self.tenant, name)
        if not shelf.versions:
            return
        version, stays = self.rng.choice(sorted(shelf.versions)), self._stays(shelf, shelf.present)
        shelf.alias_changes += 1
        changes = shelf.alias_changes
        response = await self.http.put(
            f"/v1/prefixes/{name}/aliases/prod", json={"version": version}
        )
        self._expect(response, 200, *(() if stays() else (404,)))
        if response.status_code == 200 and stays() and shelf.alias_changes == changes:
            shelf.alias = version
        self._count("alias moved")

    async def _drop_alias(self) -> None:
        name = self.rng.choice(REFERENCES)
        shelf = self.soak.book.shelf(self.tenant, name)
        shelf.alias_changes += 1
        shelf.alias = None
        response = await self.http.delete(f"/v1/prefixes/{name}/aliases/prod")
        self._expect(response, 204, 404)
        shelf.alias_changes += 1
        shelf.alias = None
        self._count("alias dropped")

    async def _delete(self) -> None:
        name = self.rng.choice(REFERENCES)
        shelf = self.soak.book.shelf(self.tenant, name)
        self._forget(shelf)
        response = await self.http.delete(f"/v1/prefixes/{name}")
        self._expect(response, 204, 404)
        # Once more: what was uploaded in the meantime may or may not have been deleted.
        self._forget(shelf)
        self._count("deleted")

    @staticmethod
    def _forget(shelf: Shelf) -> None:
        shelf.deletions += 1
        shelf.alias_changes += 1
        shelf.present, shelf.alias = False, None
        shelf.versions.clear()

    async def _bind(self) -> None:
        user, name = self.rng.choice(["ann", "bob"]), self.rng.choice(REFERENCES)
        if self.rng.random() < 0.3:
            response = await self.http.delete(f"/v1/users/{user}/prefix")
            self._expect(response, 204, 404)
        else:
            stays = self._stays(shelf := self.soak.book.shelf(self.tenant, name), shelf.present)
            response = await self.http.put(f"/v1/users/{user}/prefix", json={"prefix": name})
            self._expect(response, 200, *(() if stays() else (404,)))
        self._count("bound")

    async def _look(self) -> None:
        path = self.rng.choice(["/v1/models", "/v1/prefixes", "/metrics", "/health/ready"])
        # An engine that restarts after a failed step is not ready for a moment.
        self._expect(await self.http.get(path), 200, *((503,) if "ready" in path else ()))
        self._count("looked")

    def _expect(self, response: httpx2.Response, *statuses: int) -> None:
        if response.status_code not in statuses:
            raise Wrong(f"{response.request.url}: {response.status_code} {response.text}")

    def _count(self, what: str) -> None:
        self.soak.happened[what] += 1
