"""The demo's requests: uploads, then everything at once."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anyio

from prefixd.client.aio import AsyncClient
from prefixd.client.errors import ClientError, NotFoundError
from prefixd.client.sync import Client
from prefixd.client.types import Prefix, PrefixUsed
from prefixd.server.cli.demo.plan import Ask, Example


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request; ``first_token_s`` is from sending to the first text."""

    text: str
    prefix: PrefixUsed | None
    first_token_s: float
    total_s: float


def upload_example(client: Client, example: Example) -> Prefix:
    """Upload one example, as a text or as the folder PEFT saved."""
    if example.text is not None:
        return client.upload_text(example.name, example.text.read_text("utf-8")).prefix
    return client.upload_folder(example.name, example.folder).prefix


def first_use(client: Client, example: Example) -> float:
    """Seconds of a one-token answer: the first one under a prefix includes its compiling."""
    started = time.perf_counter()
    client.chat(example.prompts[0], model=example.name, max_tokens=1)
    return time.perf_counter() - started


def is_hidden(client: Client, name: str) -> bool:
    """Whether this client's tenant is told that there is no such prefix."""
    try:
        client.show_prefix(name)
    except NotFoundError:
        return True
    return False


def ask_all(
    url: str,
    requests: Sequence[Ask],
    *,
    keys: Mapping[str, str],
    base: str,
    on_done: Callable[[], None],
) -> list[Answer]:
    """Send all requests at the same moment; answers in the order of ``requests``.

    Raises the first request's error, after every request has ended.
    """
    answers: dict[int, Answer] = {}
    failures: list[ClientError] = []

    async def one(index: int, client: AsyncClient) -> None:
        try:
            answers[index] = await _ask(client, requests[index], base=base)
        except ClientError as error:
            failures.append(error)
        on_done()

    async def everything() -> None:
        clients = {tenant: AsyncClient(url, api_key=key) for tenant, key in keys.items()}
        try:
            async with anyio.create_task_group() as tasks:
                for index, ask in enumerate(requests):
                    tasks.start_soon(one, index, clients[ask.tenant])
        finally:
            for client in clients.values():
                await client.close()

    anyio.run(everything)
    if failures:
        raise failures[0]
    return [answers[index] for index in range(len(requests))]


async def _ask(client: AsyncClient, ask: Ask, *, base: str) -> Answer:
    sent = time.perf_counter()
    first: float | None = None
    pieces: list[str] = []
    stream = client.stream_chat(
        ask.messages, model=ask.prefix or base, max_tokens=ask.max_tokens, temperature=0.0
    )
    async with stream:
        async for chunk in stream:
            if chunk.text and first is None:
                first = time.perf_counter()
            pieces.append(chunk.text)
    done = time.perf_counter()
    return Answer(
        text="".join(pieces),
        prefix=stream.prefix,
        first_token_s=(first or done) - sent,
        total_s=done - sent,
    )


def example_folder(given: Path | None) -> Path | None:
    """The folder with ``prefixes.json``: as given, else of this checkout; None when not found."""
    candidates = [given] if given else [Path("examples"), Path(__file__).parents[5] / "examples"]
    return next((path for path in candidates if (path / "prefixes.json").is_file()), None)
