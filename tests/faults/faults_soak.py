"""Mixed traffic of many clients against one server; every response is checked.

All randomness comes from one seed. A client sends one request at a time. The expected response
depends on concurrent requests, so ``KnownState`` records what was certain when a request was sent.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2

from tests.faults.faults_known import KnownState
from tests.faults.faults_model import MAX_TOKENS, Content
from tests.faults.faults_reference import Reference
from tests.faults.faults_runner import EXCEPTIONS, NANS, Fault, marked
from tests.faults.faults_server import RunningServer
from tests.faults.faults_traffic import Answer, caller, complete, greedy, in_parts, stream

NAN_MESSAGE = "non-finite"
MISPLACED = "misplaced_prefix"
"""The code where the number of a soft prompt, which was deleted, is that of another prefix now."""
REFERENCES = tuple(f"p{i}" for i in range(6))


class SoakFailure(AssertionError):
    """A violated expectation; the message has what is needed to repeat the run."""


@dataclass
class Soak:
    """The clients of one server. ``numbers`` gives request numbers, which must be unique during the
    run; ``outcomes`` counts outcomes."""

    server: RunningServer
    reference: Reference
    known: KnownState
    tenants: tuple[str, ...]
    seed: str
    numbers: Iterator[int]
    outcomes: Counter[str]

    async def run(self, *, clients: int, actions: int) -> None:
        """Run ``clients`` concurrent clients with ``actions`` actions each."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                tenant = self.tenants[number % len(self.tenants)]
                group.create_task(self._client(f"{self.seed}:{number}", tenant, actions))

    async def _client(self, seed: str, tenant: str, actions: int) -> None:
        rng = random.Random(seed)
        async with caller(self.server.url, self.server.keys[tenant]) as http:
            for action in range(actions):
                one = _Client(self, http, tenant, rng)
                try:
                    await one.act()
                except Exception as error:
                    raise SoakFailure(f"seed {seed!r}, action {action}: {error!r}") from error


@dataclass
class _Client:
    soak: Soak
    http: httpx2.AsyncClient
    tenant: str
    rng: random.Random

    async def act(self) -> None:
        """Perform one random action."""
        ways: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (70, self._generate),
            (8, self._disconnect),
            (8, self._upload),
            (4, self._move_alias),
            (2, self._drop_alias),
            (2, self._delete),
            (3, self._bind),
            (3, self._read),
        ]
        way = self.rng.choices([w for _, w in ways], [weight for weight, _ in ways])[0]
        await way()

    # -- generation ----

    async def _generate(self) -> None:
        number = next(self.soak.numbers)
        fault = self.rng.choice(list(Fault)) if self.rng.random() < 0.06 else None
        model, check_certainty = self._model()
        prompt = self.rng.randrange(len(self.soak.reference.prompts))
        body = self._body(model, prompt, marked(number, fault))
        certain = check_certainty()
        send = stream if self.rng.random() < 0.6 else complete
        answer = await send(self.http, body)
        if answer.ok:
            content = self._check_tokens(answer, model, prompt, body)
            self._count("completed, " + ("base" if content is None else content.kind))
            if self._must_fail(fault, body):
                raise SoakFailure(f"a request marked {fault!r} was completed")
            return
        if answer.code == "deadline_exceeded" and "timeout" in body:
            self._count("deadline")
        elif (answer.status == 404 or answer.code == MISPLACED) and not certain():
            self._count("absent")
        else:
            self._check_failure(answer, model, fault)

    def _body(self, model: str, prompt: int, seed: int) -> dict[str, Any]:
        count = self.rng.randint(1, MAX_TOKENS)
        more: dict[str, Any] = {"seed": seed}
        soft = self.soak.known.soft_version(self.tenant, model)
        if self.rng.random() < 0.1:
            more["n"] = 2
        if self.rng.random() < 0.2:
            more["kv_reuse"] = False
        if self.rng.random() < 0.2:
            more["priority"] = self.rng.randint(-2, 2)
        if self.rng.random() < 0.1:
            more["timeout"] = self.rng.uniform(0.01, 0.5)
        if model == self.soak.server.base and self.rng.random() < 0.3:
            more["user"] = self.rng.choice(["ann", "bob"])
        body = greedy(model, self.soak.reference.prompts[prompt], count, **more)
        return body if soft is None or self.rng.random() < 0.4 else in_parts(body, soft)

    def _model(self) -> tuple[str, Callable[[], Callable[[], bool]]]:
        """The ``model`` of a request, and a function to call before sending it; the function that
        this returns tells, after the response, whether the model certainly existed throughout."""
        if self.rng.random() < 0.15:
            # Never certain: the prefix of a user may be deleted.
            return self.soak.server.base, lambda: lambda: False
        name = self.rng.choice(REFERENCES)
        state = self.soak.known.state(self.tenant, name)
        kind = self.rng.random()
        if kind < 0.3 and state.versions:
            version = self.rng.choice(sorted(state.versions))
            return f"{name}@{version}", state.unchanged
        if kind < 0.6 and state.alias is not None:
            changes = state.alias_changes
            return f"{name}@prod", lambda: state.unchanged(changes)
        return name, state.unchanged

    def _check_tokens(
        self, answer: Answer, model: str, prompt: int, body: dict[str, Any]
    ) -> Content | None:
        """Compare with the reference; the content that the request was under."""
        content = None
        if answer.prefix is not None:
            content = self.soak.known.digests[answer.prefix["digest"]]
            self._check_version(answer.prefix, model)
            content = content.in_parts if "messages" in body else content
        elif model != self.soak.server.base:
            raise SoakFailure(f"{model} was served by the bare base")
        if not self.soak.reference.agrees(content, prompt, answer.tokens, count=body["max_tokens"]):
            want = self.soak.reference.answer(content, prompt)
            raise SoakFailure(f"{body} under {content}: expected {want}, got {answer}")
        if body.get("kv_reuse") is False and answer.cached:
            raise SoakFailure(f"{body} shared {answer.cached} tokens with kv_reuse off")
        return content

    def _check_version(self, used: dict[str, Any], model: str) -> None:
        name, _, version = model.partition("@")
        if model != self.soak.server.base and used["name"] != name:
            raise SoakFailure(f"{model} was served with {used}")
        if version.isdigit() and used["version"] != int(version):
            raise SoakFailure(f"{model} was served with {used}")
        state = self.soak.known.state(self.tenant, used["name"])
        known = state.versions.get(used["version"])
        if known is not None and self.soak.known.digests[used["digest"]] != known:
            raise SoakFailure(f"version {used} was uploaded as {known}")

    @staticmethod
    def _must_fail(fault: Fault | None, body: dict[str, Any]) -> bool:
        """NaN in logits must fail the request. NaN in KV need not: before they are read, the
        sequence may start over after a preemption or a failed step. An exception in every
        step ends the request; after a single one the request may be retried."""
        later = fault is Fault.NAN_LOGITS and body["max_tokens"] > 1
        return later or fault in {Fault.NAN_PREFILL, Fault.RAISE}

    def _check_failure(self, answer: Answer, model: str, fault: Fault | None) -> None:
        if answer.status in {429, 503}:
            if answer.retry_after is None:
                raise SoakFailure(f"{answer} has no Retry-After")
            self._count("rejected")
        elif fault in NANS and NAN_MESSAGE in answer.message:
            self._count("NaN")
        elif fault in EXCEPTIONS and answer.code == "engine_error":
            self._count("raised")
        else:
            raise SoakFailure(f"{model}, marked {fault!r}: {answer}")

    async def _disconnect(self) -> None:
        """Send a request and disconnect at a random time."""
        model, _ = self._model()
        prompt = self.rng.randrange(len(self.soak.reference.prompts))
        body = self._body(model, prompt, marked(next(self.soak.numbers), None))
        if self.rng.random() < 0.5:
            await stream(self.http, body, leave_after=self.rng.randint(0, 4))
        else:
            task = asyncio.ensure_future(complete(self.http, body))
            await asyncio.wait({task}, timeout=self.rng.random() * 0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._count("disconnected")

    # -- prefixes and users ----

    async def _upload(self) -> None:
        name = self.rng.choice(REFERENCES)
        content = self.rng.choice(self.soak.known.contents)
        state = self.soak.known.state(self.tenant, name)
        deletions = state.deletions
        response = await self.http.put(f"/v1/prefixes/{name}", **content.body())
        self._expect(response, 200, 201)
        manifest = response.json()
        if self.soak.known.digests[manifest["digest"]] != content:
            raise SoakFailure(f"{content} was stored as {manifest}")
        if state.deletions == deletions:
            state.present = True
            state.versions[manifest["version"]] = content
        self._count("uploaded")

    async def _move_alias(self) -> None:
        name = self.rng.choice(REFERENCES)
        state = self.soak.known.state(self.tenant, name)
        if not state.versions:
            return
        version = self.rng.choice(sorted(state.versions))
        unchanged = state.unchanged()
        state.alias_changes += 1
        changes = state.alias_changes
        response = await self.http.put(
            f"/v1/prefixes/{name}/aliases/prod", json={"version": version}
        )
        self._expect(response, 200, *(() if unchanged() else (404,)))
        if response.status_code == 200 and unchanged() and state.alias_changes == changes:
            state.alias = version
        self._count("alias moved")

    async def _drop_alias(self) -> None:
        name = self.rng.choice(REFERENCES)
        state = self.soak.known.state(self.tenant, name)
        state.alias_changes += 1
        state.alias = None
        response = await self.http.delete(f"/v1/prefixes/{name}/aliases/prod")
        self._expect(response, 204, 404)
        state.alias_changes += 1
        state.alias = None
        self._count("alias dropped")

    async def _delete(self) -> None:
        name = self.rng.choice(REFERENCES)
        state = self.soak.known.state(self.tenant, name)
        state.forget()
        response = await self.http.delete(f"/v1/prefixes/{name}")
        self._expect(response, 204, 404)
        # Again after the response: a concurrent upload may or may not have been deleted.
        state.forget()
        self._count("deleted")

    async def _bind(self) -> None:
        user, name = self.rng.choice(["ann", "bob"]), self.rng.choice(REFERENCES)
        if self.rng.random() < 0.3:
            response = await self.http.delete(f"/v1/users/{user}/prefix")
            self._expect(response, 204, 404)
        else:
            unchanged = self.soak.known.state(self.tenant, name).unchanged()
            response = await self.http.put(f"/v1/users/{user}/prefix", json={"prefix": name})
            self._expect(response, 200, *(() if unchanged() else (404,)))
        self._count("bound")

    async def _read(self) -> None:
        path = self.rng.choice(["/v1/models", "/v1/prefixes", "/metrics", "/health/ready"])
        # While the engine restarts after a failed step, the server is not ready.
        self._expect(await self.http.get(path), 200, *((503,) if "ready" in path else ()))
        self._count("read")

    def _expect(self, response: httpx2.Response, *statuses: int) -> None:
        if response.status_code not in statuses:
            raise SoakFailure(f"{response.request.url}: {response.status_code} {response.text}")

    def _count(self, what: str) -> None:
        self.soak.outcomes[what] += 1
