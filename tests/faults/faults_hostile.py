"""A hostile tenant: random valid and invalid requests over every route of the API.

It may be refused, shed or timed out. An answer that says that the server failed is a defect, and so
is an error that has not the documented shape.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from tests.faults.faults_model import VOCAB, Content
from tests.faults.faults_values import (
    ALIASES,
    NAMES,
    RAW_BODIES,
    RAW_REQUESTS,
    USERS,
    SchemaValues,
    any_reference,
    any_text,
    any_upload,
    any_value,
)

_TIMEOUT_S = 2.0
"""The tenant disconnects after this time."""

_REFUSALS = frozenset({"overloaded", "deadline_exceeded"})
"""Codes of errors from 500 that say nothing is broken."""

_NOT_HTTP = 400, b"Invalid HTTP request received."
"""The answer of uvicorn's parser, before there is a request."""


@dataclass
class HostileTenant:
    """Requests of one client, all determined by ``rng``. ``document`` is the OpenAPI page;
    ``outcomes`` counts statuses, ``defects`` has a line for each answer that must not occur."""

    http: httpx2.AsyncClient
    document: Mapping[str, Any]
    rng: random.Random
    contents: list[Content]
    base: str
    outcomes: Counter[str]
    defects: list[str]
    label: str = ""
    _last: str = field(default="", init=False)

    async def act(self) -> None:
        """Send one request, and wait for the answer or disconnect."""
        ways = (
            (30, self._generate),
            (15, self._operate),
            (12, self._upload),
            (10, self._change),
            (5, self._send_raw_body),
            (3, self._send_bytes),
        )
        (way,) = self.rng.choices([way for _, way in ways], [weight for weight, _ in ways])
        timeout_s = _TIMEOUT_S if self.rng.random() < 0.8 else self.rng.random() * 0.2
        try:
            async with asyncio.timeout(timeout_s):
                await way()
        except TimeoutError:
            self.outcomes["disconnected"] += 1
        except (httpx2.TransportError, OSError) as error:
            self.outcomes[type(error).__name__] += 1

    # -- requests ----

    async def _generate(self) -> None:
        rng = self.rng
        body: dict[str, Any] = {"model": self._model(), "max_tokens": rng.choice((1, 2, 3, 8, 40))}
        path = "/v1/completions"
        if rng.random() < 0.5:
            path = "/v1/chat/completions"
            roles = ("user", "system", "assistant", "developer", "tool", "")
            turns = [(rng.choice(roles[:4]), self._words()) for _ in range(rng.randint(1, 3))]
            if rng.random() < 0.1:
                turns.append((rng.choice(roles), any_text(rng)))
            body["messages"] = [{"role": role, "content": text} for role, text in turns]
        elif rng.random() < 0.5:
            body["prompt"] = self._words()
        else:
            ids = [rng.randrange(VOCAB + (rng.random() < 0.02)) for _ in range(rng.randint(1, 60))]
            body["prompt"] = rng.choice((ids, [ids, ids[:3]]))
        schema = self.document["paths"][path]["post"]["requestBody"]["content"]
        name = schema["application/json"]["schema"]["$ref"].rpartition("/")[2]
        fields = self.document["components"]["schemas"][name]["properties"]
        for extra in rng.sample(sorted(fields), rng.randrange(5)):
            if extra not in body:
                body[extra] = SchemaValues(self.document, rng).value(fields[extra])
        if rng.random() < 0.15:
            body |= rng.choice(self._edges())
        if body.get("stream") is True or rng.random() < 0.4:
            await self._stream(path, {**body, "stream": True})
        else:
            await self._send("POST", path, content=json.dumps(body).encode())

    def _edges(self) -> tuple[dict[str, Any], ...]:
        """Fields that pass the schema and reach the scheduler or the sampler."""
        rng = self.rng
        return (
            {"min_tokens": 5, "ignore_eos": False},
            {"min_tokens": 1, "stop_token_ids": [VOCAB - 1, rng.choice((0, VOCAB, 500))]},
            {"logit_bias": {str(rng.choice((0, 5, VOCAB - 1, VOCAB))): rng.choice((100, -100))}},
            {"logit_bias": dict.fromkeys(map(str, range(VOCAB)), -100.0), "temperature": 2},
            {"stop_token_ids": list(range(64)), "min_tokens": 30, "max_tokens": 40},
            {"n": 16, "max_tokens": 2000, "timeout": 0.5},
            {"n": 128, "max_tokens": 3, "seed": 2**63 - 1},
            {"temperature": rng.choice((1e-5, 1e-320, 2)), "top_p": 1e-300, "min_p": 1.0},
            {"repetition_penalty": rng.choice((0.01, 10)), "presence_penalty": -2, "top_k": 10**30},
            {"timeout": rng.choice((1e-300, 1e-3, 1e300)), "priority": -(2**31)},
            {"stop": ["w5", " ", "w6 w7", any_text(rng)[:1024] or "x"], "logprobs": True},
            {"max_tokens": 10**12},
        )

    async def _operate(self) -> None:
        """Any operation of the OpenAPI page, with values for its parameters and its body."""
        rng = self.rng
        path = rng.choice(sorted(self.document["paths"]))
        method, operation = rng.choice(sorted(self.document["paths"][path].items()))
        values = SchemaValues(self.document, rng)
        query: dict[str, Any] = {}
        for parameter in operation.get("parameters", ()):
            value = values.value(parameter["schema"])
            name = parameter["name"]
            if parameter["in"] == "path":
                path = path.replace(f"{{{name}}}", self._segment(name))
            elif parameter["in"] == "query" and rng.random() < 0.6:
                query[name] = json.dumps(value).strip('"')[:2000]
        if rng.random() < 0.1:
            query[any_text(rng)[:50]] = any_text(rng)[:500]
        options: dict[str, Any] = {"params": query} if query else {}
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" in content and rng.random() < 0.9:
            body = values.value(content["application/json"]["schema"])
            options["content"] = json.dumps(body).encode()
        elif content:
            options["content"] = rng.choice(RAW_BODIES)
            options["type"] = rng.choice(sorted(content))
        if rng.random() < 0.05:
            method = rng.choice(("patch", "head", "options", "trace", "BREW", "put", "post"))
        await self._send(method.upper(), path, **options)

    async def _upload(self) -> None:
        headers = {}
        if self.rng.random() < 0.2:
            headers["idempotency-key"] = self.rng.choice(("one", "two", "x" * 300, "", "a b"))
        path = f"/v1/prefixes/{self._segment('name')}"
        if self.rng.random() < 0.2:
            path += f"?warm={self.rng.choice(('true', '1', 'x', ''))}"
        upload = any_upload(self.rng, self.contents)
        await self._send("PUT", path, headers=headers, **upload)

    async def _change(self) -> None:
        """Aliases, pins, warm-ups, bindings and deletes of names that often exist."""
        rng, name = self.rng, self._segment("name")
        reference, user = self._segment("reference"), self._segment("user")
        version = {"version": rng.choice((1, 2, 3, 2**31 - 1, 2**31, 0, "latest", any_value(rng)))}
        alias = {"prefix": any_reference(rng)}
        changes: tuple[tuple[str, str, Any], ...] = (
            ("PUT", f"/v1/prefixes/{name}/aliases/{rng.choice(ALIASES)}", version),
            ("DELETE", f"/v1/prefixes/{name}/aliases/{rng.choice(ALIASES)}", None),
            ("PUT", f"/v1/prefixes/{reference}/pin", rng.choice((None, version))),
            ("DELETE", f"/v1/prefixes/{name}/pin", None),
            ("POST", f"/v1/prefixes/{reference}/warm", rng.choice((None, version))),
            ("PUT", f"/v1/users/{user}/prefix", alias),
            ("DELETE", f"/v1/users/{user}/prefix", None),
            ("PUT", "/v1/default/prefix", alias),
            ("DELETE", "/v1/default/prefix", None),
        )
        method, path, body = rng.choice(changes)
        if rng.random() < 0.05:
            method, path, body = "DELETE", f"/v1/prefixes/{name}", None
        content = None if body is None else json.dumps(body).encode()
        await self._send(method, path, content=content)

    async def _send_raw_body(self) -> None:
        paths = (
            "/v1/completions",
            "/v1/chat/completions",
            f"/v1/prefixes/{self.rng.choice(NAMES)}",
        )
        path = self.rng.choice((*paths, "/v1/users/bindings:import", "/v1/default/prefix"))
        method = "POST" if path.startswith(("/v1/c", "/v1/users")) else "PUT"
        kinds = (
            "application/json",
            "application/x-ndjson",
            "text/plain",
            "",
            "multipart/form-data",
        )
        kind = self.rng.choice(
            (*kinds, "multipart/form-data; boundary=x", "application/octet-stream")
        )
        await self._send(method, path, content=self.rng.choice(RAW_BODIES), type=kind)

    async def _send_bytes(self) -> None:
        """Bytes that are no HTTP request, or the beginning of one."""
        url = urlsplit(str(self.http.base_url))
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        try:
            data = self.rng.choice((*RAW_REQUESTS, self.rng.randbytes(300)))
            writer.write(data[: self.rng.randint(1, len(data))])
            await writer.drain()
            if self.rng.random() < 0.5:
                writer.write_eof()
                await reader.read(65_536)
        finally:
            writer.close()
        self.outcomes["raw bytes"] += 1

    # -- parts of a request ----

    def _model(self) -> str:
        kind = self.rng.random()
        if kind < 0.4:
            return self.base
        reference = any_reference(self.rng)
        return f"{self.base}:{reference}" if kind < 0.5 else reference

    def _words(self) -> str:
        top = VOCAB + 4 * (self.rng.random() < 0.15)
        return " ".join(f"w{self.rng.randrange(top)}" for _ in range(self.rng.randint(1, 50)))

    def _segment(self, parameter: str) -> str:
        """A path segment: a name that often exists, or any text."""
        rng = self.rng
        if rng.random() < 0.1:
            return quote(any_text(rng)[:500], safe="") or "%20"
        match parameter:
            case "version":
                return rng.choice(("1", "2", "3", "0", "-1", "x", "latest", "prod", "9" * 30))
            case "alias":
                return rng.choice(ALIASES)
            case "user":
                return quote(rng.choice(USERS), safe="")
            case "reference" | "model":
                return quote(any_reference(rng)[:500], safe="")
            case _:
                return rng.choice(NAMES)

    # -- answers ----

    async def _send(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        type: str | None = "application/json",  # noqa: A002 - as in Content-Type
        **options: Any,
    ) -> None:
        self._last = f"{method} {path} {str(options)[:1500]}"
        sent = dict(headers or {})
        if type is not None:
            sent["content-type"] = type
        response = await self.http.request(method, path, headers=sent, **options)
        self._check(response.status_code, response.content, method=method)

    async def _stream(self, path: str, body: dict[str, Any]) -> None:
        self._last = f"POST {path} {str(body)[:1500]}"
        leaves_after = self.rng.choice((None, None, 0, 1, 5))
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        async with self.http.stream("POST", path, content=content, headers=headers) as response:
            if response.status_code != 200:
                self._check(response.status_code, await response.aread(), method="POST")
                return
            events = 0
            async for line in response.aiter_lines():
                if leaves_after is not None and events > leaves_after:
                    break
                events += bool(line)
                if '"error"' in line[:20]:
                    self._check_error(500, json.loads(line.removeprefix("data: ")))
        self.outcomes["stream"] += 1

    def _check(self, status: int, body: bytes, *, method: str) -> None:
        self.outcomes[str(status)] += 1
        if status < 400 or method == "HEAD" or (status, body) == _NOT_HTTP:
            return
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == 503 and isinstance(answer, dict) and answer.get("status") == "not ready":
            self.defects.append(f"{self.label}: not ready: {self._last}")
            return
        self._check_error(status, answer)

    def _check_error(self, status: int, answer: Any) -> None:
        error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, dict) or not error.get("message") or not error.get("code"):
            self.defects.append(f"{self.label}: {status} {str(answer)[:300]}: {self._last}")
        elif status >= 500 and error["code"] not in _REFUSALS:
            self.defects.append(f"{self.label}: {status} {error}: {self._last}")
        else:
            self.outcomes[error["code"]] += 1
