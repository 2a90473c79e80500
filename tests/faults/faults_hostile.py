"""A hostile tenant: random valid and invalid requests over every route of the API.

``faults_answers`` says which answers it may get.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2

from tests.faults.faults_answers import Answers
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


@dataclass
class HostileTenant:
    """Requests of one client, all determined by ``rng``. ``document`` is the OpenAPI page."""

    http: httpx2.AsyncClient
    document: Mapping[str, Any]
    rng: random.Random
    contents: list[Content]
    base: str
    answers: Answers

    async def act(self) -> None:
        """Send one request, and wait for the answer or disconnect."""
        ways = (
            (30, self._generate),
            (15, self._operate),
            (12, self._upload),
            (10, self._change),
            (3, self._import),
            (3, self._return_file),
            (5, self._send_raw_body),
            (3, self._send_bytes),
        )
        (way,) = self.rng.choices([way for _, way in ways], [weight for weight, _ in ways])
        timeout_s = _TIMEOUT_S if self.rng.random() < 0.8 else self.rng.random() * 0.2
        try:
            async with asyncio.timeout(timeout_s):
                await way()
        except TimeoutError:
            self.answers.outcomes["disconnected"] += 1
        except (httpx2.TransportError, OSError) as error:
            self.answers.outcomes[type(error).__name__] += 1

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

    async def _import(self) -> None:
        """Bindings of many users, with a wrong line among them now and then."""
        rng = self.rng
        lines = [
            json.dumps({"user": f"user {rng.randrange(99)}", "prefix": any_reference(rng)}).encode()
            for _ in range(rng.randrange(20))
        ]
        if rng.random() < 0.3:
            lines.insert(0, rng.choice((json.dumps(any_value(rng)).encode(), *RAW_BODIES)))
        path, content = "/v1/users/bindings:import", b"\n".join(lines)
        await self._send("POST", path, content=content, type="application/x-ndjson")

    async def _return_file(self) -> None:
        """Download a stored file, or a range of it, and upload it again, damaged or not."""
        rng, path = self.rng, f"/v1/prefixes/{self.rng.choice(NAMES)}"
        ranges = ("bytes=0-99", "bytes=5-1", "bytes=-1", "bytes=9999999-", "bytes=0-1,3-4", "x=1")
        headers = {"range": rng.choice(ranges)} if rng.random() < 0.3 else {}
        version = self._segment("version")
        answer = await self._send("GET", f"{path}/versions/{version}/content", headers=headers)
        data = bytearray(answer)
        if rng.random() < 0.6:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        await self._send("PUT", path, content=bytes(data), type="application/octet-stream")

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
        self.answers.outcomes["raw bytes"] += 1

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
    ) -> bytes:
        self.answers.request = f"{method} {path} {str(options)[:1500]}"
        sent = dict(headers or {})
        if type is not None:
            sent["content-type"] = type
        response = await self.http.request(method, path, headers=sent, **options)
        self.answers.check(response.status_code, response.content, method=method)
        return response.content

    async def _stream(self, path: str, body: dict[str, Any]) -> None:
        self.answers.request = f"POST {path} {str(body)[:1500]}"
        leaves_after = self.rng.choice((None, None, 0, 1, 5))
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        async with self.http.stream("POST", path, content=content, headers=headers) as response:
            if response.status_code != 200:
                self.answers.check(response.status_code, await response.aread(), method="POST")
                return
            events = 0
            async for line in response.aiter_lines():
                if leaves_after is not None and events > leaves_after:
                    break
                events += bool(line)
                if '"error"' in line[:20]:
                    self.answers.check_error(500, json.loads(line.removeprefix("data: ")))
        self.answers.outcomes["stream"] += 1
