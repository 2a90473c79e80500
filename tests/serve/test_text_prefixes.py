"""Text prefixes on a real base whose tokenizer and chat template both write the opening token."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from prefixd.server.serve.build import Server, build_server
from prefixd.server.serve.settings import Settings
from prefixd.store.catalog.tables import versions
from tests.api.api_world import put_text

pytestmark = pytest.mark.slow

TEMPLATE = (
    "\n{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
)
TEXT = "You are a dog in the forest."
MESSAGES = [{"role": "user", "content": "hello world"}]


def make_tokenizer() -> Any:
    """Byte-level, with an opening and a closing token around every text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    plain = tokenizers.Tokenizer(
        tokenizers.models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, [])
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    plain.add_special_tokens(["<s>", "</s>"])
    special = [(word, plain.token_to_id(word)) for word in ("<s>", "</s>")]
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_base(folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Base:
    """A served base, its tokenizer, and a client of one tenant."""

    server: Server
    tokenizer: Any
    client: TestClient
    headers: dict[str, str] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Ids of a text as it is written, without added tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def ask(self, path: str, **body: Any) -> Any:
        body |= {"max_tokens": 1, "temperature": 0, "ignore_eos": True}
        answer = self.client.post(f"/v1/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def logprob(self, ids: list[int]) -> float:
        """Of the greedy token after these ids on the bare base."""
        body = self.ask("completions", model=self.server.served.name, prompt=ids, logprobs=1)
        value: float = body["choices"][0]["logprobs"]["token_logprobs"][0]
        return value


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    scratch = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer()
    folder = save_base(scratch / "model", tokenizer)
    server = build_server(Settings(model=str(folder), data_dir=scratch, kv_tokens=1024, threads=1))
    server.tenants.create_tenant("acme")
    headers = {"Authorization": f"Bearer {server.tenants.create_key(tenant='acme').text}"}
    with TestClient(server.app, headers=headers) as client:
        yield Base(server, tokenizer, client, headers)
    server.tenants._engine.dispose()


def test_a_chat_under_a_text_prefix_has_one_opening_token_at_its_start(base: Base) -> None:
    manifest = put_text(base.client, "dog", TEXT, base.headers)
    assert manifest["num_virtual_tokens"] == 1 + len(TEXT)
    body = base.ask("chat/completions", model="dog", messages=MESSAGES, logprobs=True)
    received = body["choices"][0]["logprobs"]["content"][0]["logprob"]
    bos = base.tokenizer.bos_token_id
    chat = base.ids("\n[user] hello world ")
    once = base.logprob([bos, *base.ids(TEXT), *chat])
    twice = base.logprob([bos, *base.ids(TEXT), *base.ids("\n<s>[user] hello world ")])
    assert abs(once - twice) > 1e-3
    assert received == pytest.approx(once, abs=1e-4)
    assert body["usage"]["prompt_tokens"] == len(chat)


@pytest.mark.parametrize("text", [TEXT, "<s>" + TEXT])
@pytest.mark.parametrize("prompt", ["hello", "<s>hello"])
def test_a_completion_under_a_text_prefix_has_one_opening_token(
    base: Base, text: str, prompt: str
) -> None:
    put_text(base.client, "cat", text, base.headers)
    body = base.ask("completions", model="cat", prompt=prompt, logprobs=1)
    expected = base.logprob([base.tokenizer.bos_token_id, *base.ids(TEXT + "hello")])
    received = body["choices"][0]["logprobs"]["token_logprobs"][0]
    assert received == pytest.approx(expected, abs=1e-4)
    assert body["usage"]["prompt_tokens"] == len("hello")


def test_no_closing_token_is_appended_to_a_prompt(base: Base) -> None:
    name = base.server.served.name
    body = base.ask("completions", model=name, prompt="hello", logprobs=1)
    assert body["usage"]["prompt_tokens"] == 1 + len("hello")
    expected = base.logprob([base.tokenizer.bos_token_id, *base.ids("hello")])
    received = body["choices"][0]["logprobs"]["token_logprobs"][0]
    assert received == pytest.approx(expected, abs=1e-4)


def test_a_stored_count_is_corrected_when_the_text_is_loaded(base: Base) -> None:
    """As an earlier version stored it: with the closing token of the text counted too."""
    text = "counted with a closing token"
    manifest = put_text(base.client, "old", text, base.headers)
    right = manifest["num_virtual_tokens"]
    database = base.server.tenants._engine
    mine = versions.c.digest == manifest["digest"]
    with database.begin() as connection:
        connection.execute(update(versions).where(mine).values(num_virtual_tokens=right + 1))
    assert base.client.get("/v1/prefixes/old").json()["num_virtual_tokens"] == right + 1
    resident = base.server.engine.stats().resident_tokens
    body = base.ask("completions", model="old", prompt="hello", logprobs=1)
    expected = base.logprob([base.tokenizer.bos_token_id, *base.ids(text + "hello")])
    received = body["choices"][0]["logprobs"]["token_logprobs"][0]
    assert received == pytest.approx(expected, abs=1e-4)
    assert base.server.engine.stats().resident_tokens == resident + right
    corrected = base.client.get("/v1/prefixes/old").json()
    assert corrected["num_virtual_tokens"] == right
    assert corrected["digest"] == manifest["digest"]
    listed = base.client.get("/v1/prefixes").json()["data"]
    counts = {entry["name"]: entry["num_virtual_tokens"] for entry in listed}
    assert counts["old"] == right
    models = {m["id"]: m["max_model_len"] for m in base.client.get("/v1/models").json()["data"]}
    assert models["old"] == base.server.served.max_positions - right
    with database.connect() as connection:
        stored = connection.execute(select(versions.c.num_virtual_tokens).where(mine)).scalars()
        assert list(stored) == [right]
