"""A small T5 behind the API: what it takes, and what it refuses by name."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
from fastapi.testclient import TestClient
from torchao.quantization import Int8WeightOnlyConfig

from prefixd.server.cli.serve import load_server
from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.serve.build import build_server
from prefixd.server.serve.checks import model_origin
from prefixd.server.serve.settings import Settings
from tests.api.api_world import error_of
from tests.golden.encoder_decoders import VIRTUAL, VOCAB, adapters_of, model_of
from tests.golden.test_golden_encoder_decoder_server import EOS, word_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}w4"
COUNT = 6
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": COUNT}
MOVED = "{prompt}{prefix:0:5}"

Start = Callable[..., TestClient]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 without a chat template, and next to it what PEFT saved for it."""
    folder = tmp_path_factory.mktemp("t5") / "base"
    model = model_of("t5")
    model.save_pretrained(folder)
    word_tokenizer(VOCAB).save_pretrained(folder)
    adapters_of(model, folder.parent, ("prompt", "prefix"))
    return folder


def settings(folder: Path, data_dir: Path, **values: Any) -> Settings:
    fixed = {"kv_tokens": 1024, "threads": 1, "device": "cpu", "served_model_name": "base"}
    return Settings(model=str(folder), data_dir=data_dir, **{**fixed, **values})


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with ExitStack() as stack:

        def started(folder: Path, **values: Any) -> TestClient:
            server = build_server(settings(folder, tmp_path_factory.mktemp("data"), **values))
            stack.callback(server.tenants._engine.dispose)
            server.tenants.create_tenant("acme")
            key = server.tenants.create_key(tenant="acme").text
            client = TestClient(server.app, headers={"Authorization": f"Bearer {key}"})
            return stack.enter_context(client)

        yield started


@pytest.fixture(scope="module")
def client(folder: Path, start: Start) -> TestClient:
    client = start(folder)
    for name in ("prompt", "prefix"):
        assert put(client, name, folder.parent / name).status_code == 201
    return client


def put(client: TestClient, name: str, saved: Path, template: str | None = None) -> Any:
    files = {
        "config": ("c", (saved / "adapter_config.json").read_bytes()),
        "weights": ("w", (saved / "adapter_model.safetensors").read_bytes()),
    }
    if template is not None:
        files["metadata"] = ("m", json.dumps({"prompt_template": template}).encode())
    return client.put(f"/v1/prefixes/{name}", files=files)


def complete(client: TestClient, prompt: object = "w5 w6", **fields: Any) -> Any:
    body = {"model": "prompt", "prompt": prompt, **GREEDY, **fields}
    return client.post("/v1/completions", json=body)


def chat(client: TestClient, content: object, **fields: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    body = {"model": "prompt", "messages": messages, **GREEDY, **fields}
    return client.post("/v1/chat/completions", json=body)


def text_of(answer: Any) -> tuple[str, int]:
    """The text, and the number of tokens of the prompt."""
    assert answer.status_code == 200, answer.text
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    return choice.get("text") or choice["message"]["content"], usage["prompt_tokens"]


def refused(answer: Any, *, status: int = 400) -> tuple[str, str]:
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    return error["code"], error["message"]


def test_several_answers_log_probabilities_and_stop_strings(client: TestClient) -> None:
    choices = complete(client, n=3, logprobs=2).json()["choices"]
    assert len(choices) == 3
    assert all(choice["text"] == choices[0]["text"] for choice in choices)
    tokens = choices[0]["logprobs"]["tokens"]
    assert len(tokens) == COUNT
    assert "".join(tokens) == choices[0]["text"]
    for token, value, top in zip(
        tokens,
        choices[0]["logprobs"]["token_logprobs"],
        choices[0]["logprobs"]["top_logprobs"],
        strict=True,
    ):
        assert top[token] == value == max(top.values()) <= 0
    last = next(place for place, token in enumerate(tokens) if token not in tokens[:place][:1])
    cut = complete(client, stop=[tokens[last]]).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == "".join(tokens[: tokens.index(tokens[last])])


def test_a_template_stands_around_text_and_token_ids_alike(
    client: TestClient, folder: Path
) -> None:
    """The input ends once, where the text ends."""
    assert put(client, "around", folder.parent / "prompt", "{prefix:0:5}w9 {prompt} w8").is_success
    plain = text_of(complete(client, [9, 5, 6, 8, EOS]))
    assert plain[1] == 5
    assert text_of(complete(client, "w5 w6", model="around")) == plain
    assert text_of(complete(client, [5, 6], model="around")) == plain
    assert text_of(complete(client, "w9 w5 w6 w8")) == plain
    assert put(client, "before", folder.parent / "prompt", "{prefix:0:5}w9 {prompt}").is_success
    assert text_of(complete(client, [5, 6], model="before")) == text_of(complete(client, [9, 5, 6]))


def test_only_a_template_that_moves_no_virtual_token_is_stored(
    client: TestClient, folder: Path
) -> None:
    code, message = refused(put(client, "moved", folder.parent / "prompt", MOVED), status=422)
    assert (code, "in front of the text" in message) == ("malformed_template", True)
    assert put(client, "patched", folder.parent / "prompt").is_success

    def patch(name: str, template: object) -> Any:
        url = f"/v1/prefixes/{name}/versions/1"
        return client.patch(url, json={"prompt_template": template})

    for name, template, words in (
        ("patched", MOVED, "encoder-decoder; got others"),
        ("patched", "{prefix:0:6}{prompt}", "virtual tokens 0 to 4"),
        ("patched", 5, "expected prompt_template to be a string"),
        ("prefix", "{prefix:0:5}{prompt}", "only for a soft prompt; got kv_prefix"),
    ):
        assert words in refused(patch(name, template), status=422)[1]
    assert patch("patched", "{prefix:0:5}w9 {prompt}").is_success
    assert text_of(complete(client, model="patched")) == text_of(complete(client, "w9 w5 w6"))


def test_refusals_say_what_was_expected(client: TestClient) -> None:
    text = client.put("/v1/prefixes/words", json={"kind": "text", "text": "w5"})
    code, message = refused(text, status=422)
    assert code == "unsupported_kind"
    assert "expected a soft prompt or a KV prefix, since the encoder" in message
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 2}
    files = {"config": ("c", json.dumps(config).encode()), "weights": ("w", b"")}
    code, message = refused(client.put("/v1/prefixes/adapter", files=files), status=422)
    assert code == "unsupported_kind"
    assert "expected a soft prompt or a KV prefix, since PEFT trains no adaption" in message
    assert refused(complete(client, echo=True, logprobs=1))[0] == "prompt_not_scored"
    shown, plain = (
        complete(client, echo=echo).json()["choices"][0]["text"] for echo in (True, False)
    )
    assert shown == "w5 w6" + plain
    assert refused(chat(client, "w5"))[0] == "chat_template"
    assert refused(complete(client, []))[0] == "invalid_request"
    part = {"type": "prefix", "from": 0, "to": VIRTUAL}
    assert refused(chat(client, [part, {"type": "text", "text": "w5"}]))[0] == "chat_template"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": [5] * 3000},
            (
                "5 virtual tokens and 3000 tokens of the prompt exceed the encoder's limit: "
                "expected at most 2048 in all"
            ),
        ),
        (
            {"max_tokens": 3000},
            (
                "1 token that the decoder begins with and 3000 tokens of output can never fit: "
                "the KV pool has room for 993 tokens next to 5 virtual tokens and 3 tokens of "
                "the prompt"
            ),
        ),
    ],
)
def test_a_refusal_says_what_takes_which_room(
    client: TestClient, fields: dict[str, Any], message: str
) -> None:
    assert refused(complete(client, **fields)) == ("context_length_exceeded", message)


def test_only_a_kv_prefix_takes_positions_of_the_decoder(client: TestClient) -> None:
    lengths = {one["id"]: one["max_model_len"] for one in client.get("/v1/models").json()["data"]}
    assert lengths["base"] == lengths["prompt"] == lengths["prefix"] + VIRTUAL


def test_a_chat_is_what_the_template_renders(
    client: TestClient, folder: Path, start: Start, tmp_path: Path
) -> None:
    """Nothing is added to it, and prefix parts stand in front alone."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "chat")
    tokenizer = word_tokenizer(VOCAB)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    chatting = start(tmp_path / "chat")
    assert put(chatting, "prompt", folder.parent / "prompt").status_code == 201
    expected = text_of(complete(client, [5, 4]))
    text, part = {"type": "text", "text": "w5"}, {"type": "prefix", "from": 0, "to": VIRTUAL}
    assert text_of(chat(chatting, "w5")) == expected
    assert text_of(chat(chatting, [part, text])) == expected
    for content in ([text, part], [{**part, "to": 2}, text]):
        code, message = refused(chat(chatting, content))
        assert (code, "expected all virtual tokens in front" in message) == (
            "misplaced_prefix",
            True,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_serves_and_an_overflow_is_refused_at_start(
    dtype: str, folder: Path, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = start(folder, dtype=dtype)
    assert put(client, "prompt", folder.parent / "prompt").status_code == 201
    logprobs = complete(client, logprobs=0).json()["choices"][0]["logprobs"]["token_logprobs"]
    assert len(logprobs) == COUNT
    warning = "base may overflow in float16; expected bfloat16 or float32"
    assert (warning in caplog.text) is (dtype == "float16")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if name.startswith("encoder") and "wo.weight" in name:
            weight.data *= 3e4
    model.save_pretrained(tmp_path / "loud")
    word_tokenizer(VOCAB).save_pretrained(tmp_path / "loud")
    if dtype == "bfloat16":
        assert complete(start(tmp_path / "loud", dtype=dtype), model="base").status_code == 200
        return
    with pytest.raises(UnsupportedModel, match="other logits in float16 than in float32"):
        start(tmp_path / "loud", dtype=dtype)


def test_quantized_weights_and_an_original_are_refused_at_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scheme = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=scheme)
    model.save_pretrained(tmp_path / "rounded")
    word_tokenizer(VOCAB).save_pretrained(tmp_path / "rounded")
    for chosen, reason in (
        (
            settings(tmp_path / "rounded", tmp_path),
            (
                "t5 is an encoder-decoder that is quantized with torchao Int8WeightOnlyConfig; "
                "expected plain weights"
            ),
        ),
        (
            settings(folder, tmp_path, fingerprint_of=str(folder)),
            (
                "fingerprint_of names base as the original of base, which is not quantized; "
                "expected a quantized model, or no original"
            ),
        ),
    ):
        with pytest.raises(UnsupportedModel, match=reason):
            model_origin(chosen)
        with pytest.raises(typer.Exit):
            load_server(chosen)
        assert capsys.readouterr().err.splitlines()[-1] == f"prefixd: {reason}"
