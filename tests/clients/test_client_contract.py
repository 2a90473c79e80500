"""The client against the real application with a fake model.

``FakeRunner``'s tokens are a hash of the prefix's digest and the tokens so far, so the text proves
which prefix reached the request.
"""

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from prefixd.client import AsyncClient, Client, errors
from prefixd.server.cli.demo.plan import metric
from prefixd.server.testing import fake_generate
from tests.api.api_world import World, make_world
from tests.clients.loopback import serving

PROMPT = "Where is my parcel?"
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, str]]:
    with make_world(tmp_path_factory.mktemp("world")) as world, serving(world.app) as url:
        yield world, url


@pytest.fixture
def client(served: tuple[World, str]) -> Iterator[Client]:
    world, url = served
    with Client(url, api_key=world.keys["acme"]) as connected:
        yield connected


def _expected(digest: str | None, count: int) -> str:
    return bytes(fake_generate(digest, PROMPT.encode(), count)).decode()


def test_upload_alias_show_and_delete_a_prefix(client: Client):
    first = client.upload_text("life", "Be brief.", metadata={"by": "Zoë"})
    again = client.upload_text("life", "Be brief.", metadata={"by": "Zoë"})
    second = client.upload_text("life", "Be long.")
    assert (first.created, again.created, second.created) == (True, False, True)
    assert again.prefix.digest == first.prefix.digest
    newest = client.list_versions("life", limit=1)
    assert ([prefix.version for prefix in newest.versions], newest.next_before) == ([2], 2)
    oldest = client.list_versions("life", before=newest.next_before)
    assert ([prefix.version for prefix in oldest.versions], oldest.next_before) == ([1], None)
    assert client.set_alias("life", "prod", version=1).reference == "life@1"
    shown = client.show_prefix("life@prod")
    assert (shown.digest, shown.metadata) == (first.prefix.digest, {"by": "Zoë"})
    assert "life" in [model.id for model in client.list_models()]
    assert client.rollback("life", version=1).aliases == ("latest", "prod")
    assert client.show_prefix("life").base == "tiny"
    client.delete_version("life", 2)
    with pytest.raises(errors.ConflictError, match="alias 'prod'"):
        client.delete_version("life", 1)
    listed = client.list_versions("life", base="all").versions
    assert [prefix.version for prefix in listed] == [1]
    assert "life" in [prefix.name for prefix in client.list_prefixes(base="all").prefixes]
    client.remove_alias("life", "prod")
    with pytest.raises(errors.NotFoundError):
        client.show_prefix("life@prod")
    client.delete_prefix("life")
    with pytest.raises(errors.NotFoundError):
        client.list_versions("life")


def test_loglikelihood_of_choices_under_a_prefix(client: Client):
    client.upload_text("grade", "Be strict.", metadata={"prompt_template": "Q: {prompt} A:"})
    scored = client.loglikelihood([" yes", [32, 110]], model="grade", prompt="Hi")
    assert [choice.num_tokens for choice in scored.choices] == [4, 2]
    assert scored.choices[0].logprob == sum(scored.choices[0].token_logprobs)
    assert scored.choices[scored.best].logprob == max(each.logprob for each in scored.choices)
    assert scored.prefix is not None
    assert scored.prefix.name == "grade"
    placed = client.loglikelihood(["a"], model="grade", prompt="Hi", apply_recipe=True)
    assert placed.usage is not None
    assert placed.usage.prompt_tokens == len("Q: Hi A:a")
    chat = client.loglikelihood(["a"], model="grade", messages=HELLO, user="ann")
    assert chat.choices[0].token_ids == (97,)


def test_next_after_continues_the_list_of_prefixes(client: Client):
    names = ["page-a", "page-b", "page-c"]
    for name in names:
        client.upload_text(name, name)
    page = client.list_prefixes(limit=2, after="page-")
    assert [prefix.name for prefix in page.prefixes] == names[:2]
    last = client.list_prefixes(limit=2, after=page.next_after)
    assert last.prefixes[0].name == "page-c"


def test_completion_reports_its_prefix_or_none_for_the_base(client: Client):
    prefix = client.upload_text("voice", "Answer like a pirate.").prefix
    base = next(model.id for model in client.list_models() if model.parent is None)
    under = client.complete(PROMPT, model="voice@1", max_tokens=6, temperature=0.0)
    bare = client.complete(PROMPT, model=base, max_tokens=6, temperature=0.0)
    assert under.text == _expected(prefix.digest, 6)
    assert under.prefix is not None
    assert (under.prefix.reference, under.prefix.digest) == ("voice@1", prefix.digest)
    assert under.usage is not None
    assert (under.usage.prompt_tokens, under.usage.completion_tokens) == (len(PROMPT), 6)
    assert under.request_id
    assert (bare.text, bare.prefix) == (_expected(None, 6), None)


def test_streamed_text_of_both_clients_equals_the_completion(
    client: Client, served: tuple[World, str]
):
    digest = client.upload_text("streamed", "Sing.").prefix.digest
    with client.stream_complete(PROMPT, model="streamed", max_tokens=9, temperature=0.0) as stream:
        chunks = list(stream)
    assert stream.prefix is not None
    assert stream.prefix.digest == digest
    assert "".join(chunk.text for chunk in chunks) == _expected(digest, 9)
    assert "length" in [chunk.finish_reason for chunk in chunks]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 9

    async def asynchronously() -> list[str]:
        world, url = served
        async with AsyncClient(url, api_key=world.keys["acme"]) as async_client:
            stream = async_client.stream_complete(
                PROMPT, model="streamed", max_tokens=9, temperature=0.0
            )
            return [chunk.text async for chunk in stream]

    assert "".join(anyio.run(asynchronously)) == _expected(digest, 9)


def test_streamed_chat_text_equals_the_whole_chat_response(client: Client):
    client.upload_text("talk", "Chat.")
    whole = client.chat(HELLO, model="talk", max_tokens=5, temperature=0.0)
    with client.stream_chat(HELLO, model="talk", max_tokens=5, temperature=0.0) as stream:
        pieces = [chunk.text for chunk in stream]
    assert len(whole.text) == 5
    assert "".join(pieces) == whole.text


def test_parts_of_a_message_are_sent_as_they_are(client: Client):
    client.upload_text("words", "Chat.")
    content: list[dict[str, str | int]] = [
        {"type": "text", "text": "a"},
        {"type": "prefix", "from": 0, "to": 4},
    ]
    with pytest.raises(errors.BadRequestError, match=r"soft prompt.*words@1 of kind hard_prompt"):
        client.chat([{"role": "user", "content": content}], model="words")


def test_error_responses_raise_the_error_of_their_status(
    client: Client, served: tuple[World, str], tmp_path: Path
):
    world, url = served
    client.upload_text("mine", "x")
    with (
        Client(url, api_key=world.keys["beta"]) as other_tenant,
        pytest.raises(errors.NotFoundError) as hidden,
    ):
        other_tenant.complete("x", model="mine")
    assert hidden.value.request_id
    with Client(url) as keyless, pytest.raises(errors.AuthenticationError):
        keyless.list_models()
    with pytest.raises(errors.BadRequestError, match="tokens"):
        client.complete("x" * 1000, model="mine")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(errors.InvalidPrefixError, match="LORA"):
        client.upload_folder("lora", tmp_path)


def test_health_and_step_metrics_of_a_running_server(client: Client):
    assert client.is_live()
    assert client.is_ready()
    before = metric(client.metrics(), "prefixd_steps_total")
    client.upload_text("counted", "Count.")
    client.complete(PROMPT, model="counted", max_tokens=3)
    page = client.metrics()
    assert metric(page, "prefixd_steps_total") > before
    assert metric(page, "prefixd_distinct_prefixes_per_step_max") >= 1


def test_metadata_is_merged_and_prefixes_are_found_by_label(client: Client):
    client.upload_text("tagged", "Tag me.", metadata={"labels": {"team": "a&b=c"}, "by": "Zoë"})
    changed = client.patch_metadata("tagged", {"labels": {"lang": "de"}, "by": None}, version=1)
    assert (changed.labels, changed.metadata) == ({"team": "a&b=c", "lang": "de"}, {})
    labels = {"team": "a&b=c", "lang": "de"}
    assert [prefix.name for prefix in client.list_prefixes(labels=labels).prefixes] == ["tagged"]
    assert client.list_prefixes(labels={"team": "a"}).prefixes == ()
