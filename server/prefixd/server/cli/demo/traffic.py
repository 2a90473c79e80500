"""The demo's uploads and concurrent requests."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import anyio

from prefixd.client.aio import AsyncClient
from prefixd.client.errors import ClientError, NotFoundError
from prefixd.client.sync import Client
from prefixd.client.types import Prefix, PrefixUsed
from prefixd.server.cli.demo.plan import DemoRequest, Example


@dataclass(frozen=True, slots=True)
class Answer:
    """The response to one request; ``first_token_s`` is from sending to the first text."""

    text: str
    prefix: PrefixUsed | None
    first_token_s: float
    total_s: float


def upload_example(client: Client, example: Example) -> Prefix:
    """Upload the folder of one example."""
    return client.upload_folder(example.name, example.folder).prefix


def first_use(client: Client, example: Example) -> float:
    """Seconds that the first token takes under a prefix, its compilation included."""
    started = time.perf_counter()
    client.chat(example.prompts[0], model=example.name, max_tokens=1)
    return time.perf_counter() - started


def is_hidden(client: Client, name: str) -> bool:
    """Whether this client's tenant gets 404 for the prefix."""
    try:
        client.show_prefix(name)
    except NotFoundError:
        return True
    return False


def send_all(
    url: str,
    requests: Sequence[DemoRequest],
    *,
    keys: Mapping[str, str],
    base: str,
    on_answer: Callable[[], None],
) -> list[Answer]:
    """Send all requests concurrently; answers in the order of ``requests``.

    Raises the first error, after every request has ended.
    """
    answers: dict[int, Answer] = {}
    failures: list[ClientError] = []

    async def send(index: int, client: AsyncClient) -> None:
        try:
            answers[index] = await _send(client, requests[index], base=base)
        except ClientError as error:
            failures.append(error)
        on_answer()

    async def send_concurrently() -> None:
        clients = {tenant: AsyncClient(url, api_key=key) for tenant, key in keys.items()}
        try:
            async with anyio.create_task_group() as tasks:
                for index, request in enumerate(requests):
                    tasks.start_soon(send, index, clients[request.tenant])
        finally:
            for client in clients.values():
                await client.close()

    anyio.run(send_concurrently)
    if failures:
        raise failures[0]
    return [answers[index] for index in range(len(requests))]


async def _send(client: AsyncClient, request: DemoRequest, *, base: str) -> Answer:
    started = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    stream = client.stream_chat(
        request.messages,
        model=request.prefix or base,
        max_tokens=request.max_tokens,
        temperature=0.0,
    )
    async with stream:
        async for chunk in stream:
            if chunk.text and first is None:
                first = time.perf_counter()
            pieces.append(chunk.text)
    ended = time.perf_counter()
    return Answer(
        text="".join(pieces),
        prefix=stream.prefix,
        first_token_s=(first or ended) - started,
        total_s=ended - started,
    )
