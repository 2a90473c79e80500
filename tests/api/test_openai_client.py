"""The official openai package, unmodified, against a real server on a real socket."""

import threading
from collections.abc import Iterator
from typing import Literal

import openai
import pydantic
import pytest
import uvicorn

from tests.api.api_batches import line
from tests.api.api_world import World, fake_text
from tests.store import store_changes as changes


@pytest.fixture
def url(world: World) -> Iterator[str]:
    config = uvicorn.Config(
        world.app, host="127.0.0.1", port=0, http="httptools", ws="none", log_config=None
    )
    bound = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(timeout=20)
    bound.close()
    assert not thread.is_alive()


@pytest.fixture
def api(world: World, url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=world.keys["acme"], base_url=url, max_retries=3) as api:
        yield api


@pytest.fixture
def digest(world: World) -> str:
    published = changes.publish_text(
        world.store,
        tenant="acme",
        name="voice",
        text="Be kind.",
        metadata=None,
        base=world.served.base,
        count_tokens=world.served.count_prefix_tokens,
    )
    return published.manifest.digest


def test_openai_client_uploads_files_and_creates_batches(api: openai.OpenAI) -> None:
    content = line("a", {"prompt": "x"})
    file = api.files.create(
        file=("in.jsonl", content),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.status, file.expires_at) == ("processed", file.created_at + 3600)
    assert api.files.content(file.id).content == content
    assert [each.id for each in api.files.list()] == [file.id]
    batch = api.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    assert api.batches.retrieve(batch.id).status == "validating"  # this server runs none
    assert [each.id for each in api.batches.list()] == [batch.id]
    with pytest.raises(openai.ConflictError):
        api.files.delete(file.id)
    assert api.batches.cancel(batch.id).status == "cancelling"
    with pytest.raises(openai.NotFoundError):
        api.batches.retrieve("batch_" + "0" * 32)


def test_openai_client_lists_models(api: openai.OpenAI, digest: str) -> None:
    assert digest
    assert [model.id for model in api.models.list()] == ["tiny", "voice"]
    assert api.models.retrieve("tiny:voice@1").id == "tiny:voice@1"


def test_openai_client_completes(api: openai.OpenAI, digest: str) -> None:
    answer = api.completions.create(model="voice", prompt="hello", max_tokens=8, temperature=0)
    assert answer.choices[0].text == fake_text(digest, "hello", 8)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 13
    assert answer.model_extra is not None
    assert answer.model_extra["prefix"]["digest"] == digest


def test_openai_client_chats(api: openai.OpenAI, digest: str) -> None:
    answer = api.chat.completions.create(
        model="voice@1",
        messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        max_completion_tokens=5,
        logprobs=True,
        top_logprobs=1,
    )
    rendered = "system: s\nuser: u\nassistant: "
    assert answer.choices[0].message.content == fake_text(digest, rendered, 5)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5


def test_openai_client_may_send_a_response_message_back(api: openai.OpenAI) -> None:
    first = api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "u"}], max_tokens=2
    )
    turn = first.choices[0].message
    second = api.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "user", "content": "u"},
            turn.to_dict(),  # type: ignore[list-item]
            {"role": "user", "content": "v"},
        ],
        max_tokens=2,
    )
    rendered = f"user: u\nassistant: {turn.content}\nuser: v\nassistant: "
    assert second.choices[0].message.content == fake_text(None, rendered, 2)


def test_openai_client_streams(api: openai.OpenAI, digest: str) -> None:
    stream = api.chat.completions.create(
        model="voice",
        messages=[{"role": "user", "content": "u"}],
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == fake_text(digest, "user: u\nassistant: ", 7)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


def test_closing_a_stream_in_the_openai_client_aborts_the_request(
    api: openai.OpenAI, world: World
) -> None:
    world.runner.hold_after = len(world.runner.steps) + 3
    stream = api.completions.create(model="tiny", prompt="x", max_tokens=300, stream=True, n=2)
    next(iter(stream))
    assert world.runner.held.wait(20)
    stream.close()
    labels = {"endpoint": "completions", "outcome": "aborted"}
    registry = world.metrics.registry
    for _ in range(1000):
        if registry.get_sample_value("prefixd_generation_requests_total", labels):
            break
        api.models.list()
    world.runner.gate.set()
    api.completions.create(model="tiny", prompt="y", max_tokens=2)
    world.engine.state()  # answered after the step that sent the last token
    finished = world.engine.stats().finished
    assert finished["abort"] == 2
    assert finished.get("length", 0) <= 1


def test_openai_client_raises_its_own_error_classes(api: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="absent", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        api.completions.create(model="tiny", prompt="x" * 1000)
    assert long.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(api_key="nonsense", base_url=url) as unauthorized,
        pytest.raises(openai.AuthenticationError),
    ):
        unauthorized.models.list()


def test_openai_client_raises_an_error_event_of_a_stream(api: openai.OpenAI, world: World) -> None:
    world.runner.hold_after = len(world.runner.steps) + 3
    stream = api.completions.create(model="tiny", prompt="x", max_tokens=300, stream=True)
    chunks = iter(stream)
    next(chunks)
    assert world.runner.held.wait(20)
    world.runner.fail = True
    world.runner.gate.set()
    with pytest.raises(openai.APIError, match="engine"):
        list(chunks)


class Pet(pydantic.BaseModel):
    kind: Literal["dog", "cat"]
    count: Literal[1, 2, 3]
    tags: list[Literal["a", "b"]] = pydantic.Field(min_length=1, max_length=1)
    owner: Literal["ann"] | None


def test_openai_client_parses_a_model(api: openai.OpenAI) -> None:
    answer = api.chat.completions.parse(
        model="tiny",
        messages=[{"role": "user", "content": "u"}],
        response_format=Pet,
        max_completion_tokens=120,
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Pet)
    assert choice.message.content == choice.message.parsed.model_dump_json()


def test_openai_client_streams_a_model(api: openai.OpenAI) -> None:
    with api.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": "u"}],
        response_format=Pet,
        max_completion_tokens=120,
    ) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Pet)


def test_openai_client_says_that_a_parsed_answer_was_cut(api: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        api.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "u"}],
            response_format=Pet,
            max_completion_tokens=5,
        )


def test_openai_client_sends_structured_outputs(api: openai.OpenAI) -> None:
    answer = api.completions.create(
        model="tiny",
        prompt="hello",
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert answer.choices[0].text in {"yes", "no"}
