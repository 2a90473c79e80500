"""Both clients on a real socket: every test runs with each."""

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import pytest

from prefixd.client import AsyncClient, Client, CompletionChunk, PrefixUsed, errors
from tests.clients.loopback import Loopback
from tests.clients.samples import MANIFEST, TEXT_CHUNKS, TEXT_EVENTS, USED

DELTA = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
HELLO = [{"role": "user", "content": "Hi"}]


class AwaitedSync:
    """The sync client with the async client's methods, so that one test body serves both."""

    def __init__(self, url: str, **options: Any) -> None:
        self.slept: list[float] = []
        self._client = Client(url, sleep=self.slept.append, **options)

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(self._client, name)(*args, **kwargs)

        return call

    async def stream(self, name: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        with getattr(self._client, name)(*args, **kwargs) as stream:
            yield stream
            for chunk in stream:
                yield chunk


class Async:
    """The async client, with ``stream`` yielding first the stream and then its chunks."""

    def __init__(self, url: str, **options: Any) -> None:
        self.slept: list[float] = []
        self._client = AsyncClient(url, sleep=self._sleep, **options)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def stream(self, name: str, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with getattr(self._client, name)(*args, **kwargs) as stream:
            yield stream
            async for chunk in stream:
                yield chunk


Run = Callable[..., None]


@pytest.fixture(params=[AwaitedSync, Async], ids=["sync", "async"])
def run(request: pytest.FixtureRequest, server: Loopback) -> Run:
    """Run a coroutine function on a fresh client of one kind."""

    def run_body(
        body: Callable[[Any], Awaitable[None]], *, url: str | None = None, **options: Any
    ) -> None:
        async def with_client() -> None:
            client = request.param(url or server.url, api_key="pfx_secret", **options)
            try:
                await body(client)
            finally:
                await client.close()

        anyio.run(with_client)

    return run_body


def test_api_key_and_json_body_reach_the_server(run: Run, server: Loopback):
    choice = {"index": 0, "text": " Paris", "finish_reason": "stop"}
    server.reply({"id": "c", "model": "triage", "choices": [choice], "prefix": USED})

    async def body(client: Any) -> None:
        completion = await client.complete("Where?", model="triage", temperature=0.0, seed=7)
        assert completion.text == " Paris"
        assert completion.prefix == PrefixUsed(name="triage", version=3, digest="ab" * 32)

    run(body)
    (seen,) = server.seen
    assert (seen.method, seen.path) == ("POST", "/v1/completions")
    assert seen.headers["authorization"] == "Bearer pfx_secret"
    assert seen.json == {"model": "triage", "prompt": "Where?", "temperature": 0.0, "seed": 7}


def test_uploaded_folder_arrives_as_the_documented_parts(
    run: Run, server: Loopback, tmp_path: Path
):
    (tmp_path / "adapter_config.json").write_bytes(b'{"peft_type":"PROMPT_TUNING"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4096)
    server.reply(MANIFEST, status=201)

    async def body(client: Any) -> None:
        uploaded = await client.upload_folder("triage", tmp_path, metadata={"task_id": 1})
        assert uploaded.created
        assert uploaded.prefix.reference == "triage@3"

    run(body)
    (seen,) = server.seen
    assert (seen.method, seen.path) == ("PUT", "/v1/prefixes/triage")
    assert seen.parts == {
        "config": b'{"peft_type":"PROMPT_TUNING"}',
        "weights": bytes(range(256)) * 4096,
        "metadata": b'{"task_id":1}',
    }
    assert "content-length" in seen.headers


@pytest.mark.parametrize("source", ["bytes", "file"])
def test_stored_file_is_sent_and_received_as_it_is(
    run: Run, server: Loopback, tmp_path: Path, source: str
):
    data = bytes(range(256)) * 4096
    file = tmp_path / "triage-3.prefix"
    file.write_bytes(data)
    digest: dict[str, Any] = {"x_prefixd_prefix_digest": sha256(data).hexdigest()}
    server.reply(MANIFEST, status=201)
    for _ in range(3):
        server.reply(data, **digest)

    async def body(client: Any) -> None:
        uploaded = await client.upload_artifact("triage", file if source == "file" else data)
        assert (uploaded.created, uploaded.prefix.reference) == (True, "triage@3")
        assert await client.download_artifact("triage") == data
        assert await client.download_artifact("triage", version=3) == data
        assert await client.download_artifact("triage", version="prod") == data

    run(body)
    assert server.seen[0].octets == data
    assert [f"{seen.method} {seen.path}" for seen in server.seen] == [
        "PUT /v1/prefixes/triage",
        "GET /v1/prefixes/triage/versions/latest/content",
        "GET /v1/prefixes/triage/versions/3/content",
        "GET /v1/prefixes/triage/versions/prod/content",
    ]


@pytest.mark.parametrize("headers", [{}, {"x_prefixd_prefix_digest": "ab" * 32}])
def test_downloaded_file_with_another_digest_is_an_error(
    run: Run, server: Loopback, headers: dict[str, Any]
):
    server.reply(b"data", **headers)

    async def body(client: Any) -> None:
        with pytest.raises(errors.ProtocolError, match=sha256(b"data").hexdigest()):
            await client.download_artifact("triage")

    run(body)


def test_methods_and_paths_of_the_other_prefix_operations(run: Run, server: Loopback):
    server.reply({"data": [MANIFEST], "next_after": "triage"})
    server.reply({"data": [MANIFEST]})
    server.reply(MANIFEST)
    server.reply("", status=204)
    server.reply("", status=204)
    server.reply({"data": [{"id": "base"}, {"id": "triage", "parent": "base"}]})
    server.reply("# HELP x\nx 1\n")
    server.reply({}, status=503)

    async def body(client: Any) -> None:
        page = await client.list_prefixes(limit=1, after="a")
        assert [page.prefixes[0].name, page.next_after] == ["triage", "triage"]
        assert len((await client.list_versions("triage")).versions) == 1
        assert (await client.set_alias("triage", "prod", version=3)).version == 3
        await client.remove_alias("triage", "prod")
        await client.delete_prefix("triage")
        assert [model.parent for model in await client.list_models()] == [None, "base"]
        assert await client.metrics() == "# HELP x\nx 1\n"
        assert not await client.is_ready()

    run(body)
    assert [f"{seen.method} {seen.path}" for seen in server.seen] == [
        "GET /v1/prefixes",
        "GET /v1/prefixes/triage/versions",
        "PUT /v1/prefixes/triage/aliases/prod",
        "DELETE /v1/prefixes/triage/aliases/prod",
        "DELETE /v1/prefixes/triage",
        "GET /v1/models",
        "GET /metrics",
        "GET /health/ready",
    ]
    assert server.seen[0].query == {"limit": "1", "after": "a"}
    assert server.seen[2].json == {"version": 3}


def test_error_response_raises_its_class_with_code_and_request_id(run: Run, server: Loopback):
    error = {"message": "no prefix 'x'", "code": "not_found", "request_id": "r5"}
    server.reply({"error": error}, status=404)

    async def body(client: Any) -> None:
        with pytest.raises(errors.NotFoundError, match="no prefix 'x'") as caught:
            await client.show_prefix("x")
        assert (caught.value.code, caught.value.request_id) == ("not_found", "r5")

    run(body)


def test_503_and_429_are_retried_after_retry_after(run: Run, server: Loopback):
    full = {"error": {"message": "full"}}
    server.reply(full, status=503, retry_after="2")
    server.reply(full, status=429, retry_after="1")
    server.reply({"data": []})

    async def body(client: Any) -> None:
        assert await client.list_models() == ()
        assert client.slept == [2.0, 1.0]

    run(body)


def test_retry_sends_an_uploaded_file_whole_again(run: Run, server: Loopback, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    server.reply({"error": {"message": "full"}}, status=503, retry_after="0")
    server.reply(MANIFEST, status=200)

    async def body(client: Any) -> None:
        assert not (await client.upload_folder("triage", tmp_path)).created

    run(body)
    assert [seen.parts["weights"] for seen in server.seen] == [b"weights", b"weights"]


def test_refused_connection_raises_connect_error_after_retries(run: Run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

        async def body(client: Any) -> None:
            with pytest.raises(errors.ConnectError, match=url):
                await client.is_live()
            assert len(client.slept) == 3

        run(body, url=url)


def test_timeout_raises_timed_out_error_without_retry(run: Run):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        slept: list[float] = []

        async def body(client: Any) -> None:
            with pytest.raises(errors.TimedOutError, match="in time"):
                await client.is_live()
            slept[:] = client.slept

        for timeout in (0.5, 10.0):
            run(body, url=url, timeout=timeout)
            if not slept:  # else it was a busy machine that took half a second to connect
                break
        assert slept == []


def test_unsupported_url_raises_protocol_error(run: Run):
    async def body(client: Any) -> None:
        with pytest.raises(errors.ProtocolError, match="is not the URL of a server"):
            await client.is_live()

    run(body, url="ftp://example")


def test_stream_has_chunks_prefix_and_request_id(run: Run, server: Loopback):
    used: dict[str, Any] = {
        "x_prefixd_prefix": "triage@3",
        "x_prefixd_prefix_digest": "ff",
        "x_request_id": "r1",
    }
    server.stream(TEXT_EVENTS[:20], TEXT_EVENTS[20:], **used)

    async def body(client: Any) -> None:
        stream, *chunks = [item async for item in client.stream("stream_complete", "Hi", model="t")]
        assert chunks == TEXT_CHUNKS
        assert (stream.prefix, stream.request_id) == (
            PrefixUsed(name="triage", version=3, digest="ff"),
            "r1",
        )

    run(body)
    assert isinstance(server.seen[0].json, dict)
    assert server.seen[0].json["stream"] is True


def test_leaving_a_stream_early_closes_the_connection(run: Run, server: Loopback):
    server.stream(DELTA, endless=True)

    async def body(client: Any) -> None:
        chunks = client.stream("stream_chat", HELLO, model="base")
        await anext(chunks)
        assert await anext(chunks) == CompletionChunk(text="a", index=0)
        await chunks.aclose()
        assert server.hung_up.wait(30)

    run(body)


def test_leaving_an_unread_stream_closes_the_connection(run: Run, server: Loopback):
    server.stream(DELTA, endless=True)

    async def body(client: Any) -> None:
        chunks = client.stream("stream_chat", HELLO, model="base")
        stream = await anext(chunks)
        await chunks.aclose()
        assert server.hung_up.wait(30)
        assert stream.request_id is None  # and is alive still: no collector closed it

    run(body)


def test_leaving_a_sync_loop_early_closes_the_connection(server: Loopback):
    server.stream(DELTA, endless=True)
    with Client(server.url) as client:
        for chunk in client.stream_chat(HELLO, model="base"):
            assert chunk == CompletionChunk(text="a", index=0)
            break
        assert server.hung_up.wait(30)


def test_stream_request_is_retried_and_raises_the_error_class(run: Run, server: Loopback):
    server.reply({"error": {"message": "full"}}, status=503, retry_after="1")
    server.reply({"error": {"message": "no such prefix"}}, status=404)

    async def body(client: Any) -> None:
        with pytest.raises(errors.NotFoundError, match="no such prefix"):
            await anext(client.stream("stream_chat", HELLO, model="x"))
        assert client.slept == [1.0]

    run(body)


def test_stream_that_ends_early_raises_interrupted(run: Run, server: Loopback):
    server.stream(DELTA)

    async def body(client: Any) -> None:
        with pytest.raises(errors.StreamInterruptedError):
            _ = [item async for item in client.stream("stream_chat", HELLO, model="x")]

    run(body)


def test_non_ascii_text_and_metadata_arrive_unchanged(run: Run, server: Loopback):
    server.reply(MANIFEST, status=201)

    async def body(client: Any) -> None:
        await client.upload_text("voice", "Grüezi 🦊", metadata={"from": "Zürich"})

    run(body)
    expected = {"kind": "text", "text": "Grüezi 🦊", "metadata": {"from": "Zürich"}}
    assert server.seen[0].json == json.loads(json.dumps(expected))
