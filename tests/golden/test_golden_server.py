"""Upload and generate over REST give the tokens of PEFT.

A real server process on tiny random models and on the demo model, called by prefixd's client.
"""

import base64
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import peft
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from prefixd.client import Client
from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.golden import scores
from tests.golden.golden_harness import (
    Adapter,
    make_adapter,
    make_adaption_prompt,
    peft_configs,
    plain_generate,
    prompts,
    tiny_model,
)
from tests.golden.placed import reference
from tests.golden.real_model_facts import FACTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTHS = {"PREFIX_TUNING": 37, "PROMPT_TUNING": 20, "CARTRIDGE": 16}
COUNT = 12
TRIAGE = Path(__file__).parents[2] / "examples" / "triage"


@dataclass
class ModelUnderTest:
    """A model in this process for PEFT, and the same model behind HTTP; and the folder of a KV
    prefix that was trained on it, if there is one."""

    model: Any
    tokenizer: Any
    url: str
    key: str
    base: str
    trained: Path | None = None

    def upload(self, adapter: Adapter, name: str) -> None:
        with Client(self.url, api_key=self.key) as client:
            metadata = None if adapter.task_id is None else {"task_id": adapter.task_id}
            assert client.upload_folder(name, adapter.folder, metadata=metadata).created

    def complete(
        self, prompts_: list[list[int]] | None, model: str, **fields: Any
    ) -> list[list[str]]:
        """Texts of the generated tokens, one by one, for all prompts in one request."""
        body = {
            "model": model,
            "prompt": prompts_,
            "max_tokens": COUNT,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            **fields,
        }
        choices = sorted(
            self.post("completions", **body)["choices"], key=lambda choice: choice["index"]
        )
        return [[decoded(token) for token in choice["logprobs"]["tokens"]] for choice in choices]

    def post(self, path: str, **body: Any) -> Any:
        headers = {"authorization": f"Bearer {self.key}"}
        answer = httpx2.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def texts(self, tokens: list[int]) -> list[str]:
        return [self.tokenizer.decode([token]) for token in tokens]


def decoded(token: str) -> str:
    """What a tokenizer decodes a token to that is written as its bytes if they are no text."""
    if not token.startswith("bytes:"):
        return token
    raw = token.removeprefix("bytes:").encode("ascii").decode("unicode_escape")
    return raw.encode("latin-1").decode(errors="replace")


def word_tokenizer(size: int) -> Any:
    """A tokenizer with one word for each id, so that every token has its own text."""
    vocabulary = {f"w{i}": i for i in range(size)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain)


def folder_of(name: str, scratch: Path) -> Path:
    """A model folder to serve."""
    if name == "demo":
        return demo_model(default_cache_dir())
    model = tiny_model(name)
    model.save_pretrained(scratch / name)
    word_tokenizer(model.config.vocab_size).save_pretrained(scratch / name)
    return scratch / name


@pytest.fixture(
    scope="module",
    params=["llama", "gpt2", pytest.param("demo", marks=pytest.mark.demo_model)],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModelUnderTest]:
    scratch = tmp_path_factory.mktemp(request.param)
    folder = folder_of(request.param, scratch)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = scratch / "data"
    data.mkdir()
    admin(data, "tenant", "create", "golden")
    issued = admin(data, "key", "create", "--tenant", "golden")
    assert isinstance(issued, dict)
    with ServerProcess(data_dir=data, port=0, model=str(folder)) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        with Client(url, api_key=str(issued["key"])) as client:
            base = client.list_models()[0].id
        trained = TRIAGE if request.param == "demo" else None
        yield ModelUnderTest(model, tokenizer, url, str(issued["key"]), base, trained)


@pytest.mark.parametrize("peft_type", [*peft_configs(1), "ADAPTION_PROMPT"])
def test_tokens_over_http_under_a_prefix_equal_those_of_peft(
    served: ModelUnderTest, peft_type: str, tmp_path: Path
) -> None:
    length = LENGTHS.get(peft_type, 9)
    if peft_type == "ADAPTION_PROMPT":
        adapter = make_adaption_prompt(served.model, length, tmp_path / "adapter")
    else:
        adapter = make_adapter(served.model, peft_type, length, tmp_path / "adapter")
    name = peft_type.lower().replace("_", "-")
    served.upload(adapter, name)
    token_prompts = prompts(4, seed=length)
    answers = served.complete(token_prompts, name)
    assert answers == [served.texts(adapter.generate(prompt, COUNT)) for prompt in token_prompts]
    assert answers != served.complete(token_prompts, served.base)


def test_tokens_over_http_of_the_base_equal_those_of_transformers(served: ModelUnderTest) -> None:
    token_prompts = prompts(4, seed=2)
    expected = [
        served.texts(plain_generate(served.model, prompt, COUNT)) for prompt in token_prompts
    ]
    assert served.complete(token_prompts, served.base) == expected


KINDS = ["base", "text", "PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT"]


def _scored_adapter(served: ModelUnderTest, kind: str, folder: Path) -> Adapter:
    """A random one. As a KV prefix of the demo model a trained one: random keys and values enlarge
    rounding there, also that of transformers (to 2.7e-4), to more than a score may differ."""
    if kind == "ADAPTION_PROMPT":
        return make_adaption_prompt(served.model, 9, folder)
    if kind == "PREFIX_TUNING" and served.trained is not None:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(served.model), served.trained).eval()
        return Adapter(model, served.trained, None)
    return make_adapter(served.model, kind, LENGTHS[kind], folder)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_over_http_equal_those_of_peft(
    served: ModelUnderTest, kind: str, tmp_path: Path
) -> None:
    """As lm-evaluation-harness asks for them, and as choices of one prompt."""
    model, name, before = served.model, served.base, list[int]()
    if kind == "text":
        name = "scored-text"
        text = served.tokenizer.decode(prompts(1, seed=7)[0])
        before = served.tokenizer.encode(text)
        with Client(served.url, api_key=served.key) as client:
            client.upload_text(name, text)
    elif kind != "base":
        name = f"scored-{kind.lower().replace('_', '-')}"
        adapter = _scored_adapter(served, kind, tmp_path)
        served.upload(adapter, name)
        model = adapter.model
    exact = copy.deepcopy(model).double()
    texts = prompts(5, seed=12)
    answer = served.post(
        "completions",
        model=name,
        prompt=texts,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    for choice, ids in zip(answer["choices"], texts, strict=True):
        values = choice["logprobs"]["token_logprobs"]
        assert len(values) == len(ids) + 1, "the token that was asked for comes last"
        expected = scores.reference(exact, [*before, *ids])[len(before) :]
        own = expected.gather(1, torch.tensor(ids)[1:, None])[:, 0]
        given = torch.tensor(values[1:-1], dtype=own.dtype)
        torch.testing.assert_close(given, own, atol=1e-4, rtol=0)
        assert (values[0] is not None) == (kind in {"text", "PROMPT_TUNING"})
    context, choices = texts[0] * 3, [ids[:6] for ids in texts[1:]]
    answer = served.post("loglikelihood", model=name, prompt=context, choices=choices)
    for choice, ids in zip(answer["choices"], choices, strict=True):
        expected = scores.reference(exact, [*before, *context, *ids])[-len(ids) :]
        own = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert abs(choice["logprob"] - float(own.sum())) < 1e-4 * len(ids)
        assert choice["is_greedy"] == (expected.argmax(dim=-1).tolist() == ids)


def test_embeddings_of_tokens_give_the_tokens_that_follow_them(
    served: ModelUnderTest, tmp_path: Path
) -> None:
    served.upload(make_adapter(served.model, "PREFIX_TUNING", 5, tmp_path / "kv"), "under-kv")
    served.upload(make_adapter(served.model, "P_TUNING", 5, tmp_path / "soft"), "under-soft")
    token_prompts = prompts(3, seed=4)
    embed = served.model.get_input_embeddings()
    sent = [
        base64.b64encode(safetensors.torch.save({"e": embed(torch.tensor(ids)).detach()})).decode()
        for ids in token_prompts
    ]
    outputs = []
    for model in (served.base, "under-kv", "under-soft"):
        expected = served.complete(token_prompts, model)
        for _ in range(2):  # the second time, KV is reused
            assert served.complete(None, model, prompt_embeds=sent) == expected
        mixed = served.complete(token_prompts, model, prompt_embeds=sent[:1])
        assert mixed == [expected[0], *expected]
        outputs.append(expected)
    assert len(set(map(str, outputs))) == 3


def test_facts_of_the_openai_endpoints_on_a_real_model(served: ModelUnderTest) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as api:
        api.base_name = served.base  # type: ignore[attr-defined]
        assert [fact.__name__ for fact in FACTS if not fact(api)] == []


def test_a_text_prefix_gives_the_tokens_of_the_full_text(served: ModelUnderTest) -> None:
    head, rest = prompts(2, seed=6)
    text = served.tokenizer.decode(head)
    tokens = served.tokenizer.encode(text)
    with Client(served.url, api_key=served.key) as client:
        client.upload_text("head", text)
    expected = served.texts(plain_generate(served.model, tokens + rest, COUNT))
    assert served.complete([rest], "head") == [expected]


def test_virtual_tokens_are_placed_over_http_as_in_transformers(
    served: ModelUnderTest, tmp_path: Path
) -> None:
    adapter = make_adapter(served.model, "PROMPT_TUNING", 9, tmp_path / "adapter")
    rows = adapter.model.get_prompt_embedding_to_save("default").float()
    prefix, text = f"placed-{served.base.lower()}", "w7 w8"
    with Client(served.url, api_key=served.key) as client:
        template = "{prefix:0:4}w5 w6 {prompt}{prefix:4:9} w9"
        client.upload_folder(prefix, adapter.folder, metadata={"prompt_template": template})
    before, after = served.tokenizer("w5 w6 ").input_ids, served.tokenizer(" w9").input_ids
    ids = prompts(1, seed=7)[0]
    expected = reference(served.model, rows, [(0, 4), [*before, *ids], (4, 9), after], COUNT)
    assert served.complete([ids], prefix) == [served.texts(expected)]
    whole = served.tokenizer(f"w5 w6 {text}").input_ids
    expected = reference(served.model, rows, [(0, 4), whole, (4, 9), after], COUNT)
    assert served.complete([text], prefix) == [served.texts(expected)]  # type: ignore[list-item]

    if served.tokenizer.chat_template is None:
        return
    with Client(served.url, api_key=served.key) as client:
        client.upload_folder(f"{prefix}-parts", adapter.folder)
        parts: list[dict[str, str | int]] = [
            {"type": "text", "text": "Say it"},
            {"type": "prefix", "from": 2, "to": 9},
            {"type": "text", "text": " now."},
        ]
        answer = client.chat(
            [{"role": "user", "content": parts}],
            model=f"{prefix}-parts",
            max_tokens=COUNT,
            temperature=0.0,
            ignore_eos=True,
        )
    turns = [{"role": "user", "content": "Say it@@ now."}]
    rendered = served.tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
    runs = [
        served.tokenizer(run, add_special_tokens=False).input_ids for run in rendered.split("@@")
    ]
    expected = reference(served.model, rows, [(0, 2), runs[0], (2, 9), runs[1]], COUNT)
    assert answer.text == served.tokenizer.decode(expected, skip_special_tokens=True)


def test_stacks_and_blends_over_http_equal_transformers_on_the_same_embeddings(
    served: ModelUnderTest, tmp_path: Path
) -> None:
    softs = [
        make_adapter(served.model, "PROMPT_TUNING", 9, tmp_path / str(seed), seed=seed)
        for seed in (21, 22)
    ]
    rows = [soft.model.get_prompt_embedding_to_save("default").float() for soft in softs]
    texts = ["w5 w6 ", "w7 w8 w9"]
    with Client(served.url, api_key=served.key) as client:
        for name, soft in zip(("one", "two"), softs, strict=True):
            client.upload_folder(name, soft.folder)
        for name, text in zip(("first", "second"), texts, strict=True):
            client.upload_text(name, text)
        stack = {"stack": ["one", "first", "second", "two"]}
        blend = {"blend": {"one": 0.75, "two": 0.25}}
        client.upload_composition("stacked", stack)
        client.upload_composition("blended", blend)
    ids = prompts(1, seed=8)[0]
    both = torch.cat(rows)
    text = served.tokenizer("".join(texts)).input_ids
    of_stack = reference(served.model, both, [(0, 9), text, (9, 18), ids], COUNT)
    mean = rows[0] * 0.75 + rows[1] * 0.25
    of_blend = reference(served.model, mean, [(0, 9), ids], COUNT)
    assert of_stack != of_blend
    for expected, name, composed in (
        (of_stack, "stacked", stack),
        (of_blend, "blended", blend),
    ):
        assert served.complete([ids], name) == [served.texts(expected)]
        assert served.complete([ids], served.base, prefix=composed) == [served.texts(expected)]
