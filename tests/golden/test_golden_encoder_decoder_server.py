"""An encoder-decoder behind HTTP: PEFT's folder is uploaded, and gives PEFT's tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import tokenizers
import transformers

from prefixd.client import ApiError, Client
from prefixd.server.cli.demo.child import ServerProcess, admin
from tests.golden.encoder_decoders import COUNT, VOCAB, adapters_of, generate, model_of, sources
from tests.golden.golden_harness import Adapter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EOS = 1
SPECIAL = {"<pad>": 0, "</s>": EOS}


def token_id(token: str) -> int:
    """The id of a word of ``word_tokenizer``."""
    return SPECIAL[token] if token in SPECIAL else int(token[1:])


@dataclass
class Behind:
    """A T5 in this process, and the same one behind HTTP."""

    model: Any
    adapters: dict[str, Adapter]
    url: str
    key: str
    base: str

    def post(self, path: str, **body: Any) -> Any:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx2.post(f"{self.url}{path}", json=body, headers=headers, timeout=300)

    def complete(self, source: list[int], model: str) -> Any:
        """The answer to an input as text, to which the tokenizer adds the end of a sequence."""
        text = " ".join(f"w{token}" for token in source)
        fields = {"max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        answer = self.post("/v1/completions", model=model, prompt=text, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()


def word_tokenizer(size: int) -> Any:
    """One word for each id; as T5's, it ends a text."""
    vocabulary = SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), size)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS)]
    )
    plain.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    scratch = tmp_path_factory.mktemp("t5")
    folder, data = scratch / "base", scratch / "data"
    model_of("t5").save_pretrained(folder)
    word_tokenizer(VOCAB).save_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    kinds = ("prompt", "prefix")
    adapters = dict(zip(kinds, adapters_of(model, scratch, kinds), strict=True))
    data.mkdir()
    admin(data, "tenant", "create", "golden")
    issued = admin(data, "key", "create", "--tenant", "golden")
    assert isinstance(issued, dict)
    with ServerProcess(data_dir=data, port=0, model=str(folder)) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        with Client(url, api_key=str(issued["key"])) as client:
            base = client.list_models()[0].id
            for name, adapter in adapters.items():
                assert client.upload_folder(name, adapter.folder).created
        yield Behind(model, adapters, url, str(issued["key"]), base)


def test_tokens_over_http_equal_those_of_peft(behind: Behind) -> None:
    outputs = set()
    for source in sources(4):
        for name in (behind.base, *behind.adapters):
            adapter = behind.adapters.get(name)
            reference = behind.model if adapter is None else adapter.model
            answer = behind.complete(source, name)
            tokens = [token_id(token) for token in answer["choices"][0]["logprobs"]["tokens"]]
            assert tokens == generate(reference, [*source, EOS]), (name, source)
            assert answer["usage"]["prompt_tokens"] == len(source) + 1
            assert answer["usage"]["completion_tokens"] == COUNT
            outputs.add(tuple(tokens))
    assert len(outputs) > 6, "the inputs hardly matter"


def test_what_an_encoder_decoder_cannot_do_is_refused_by_name(behind: Behind) -> None:
    chat = behind.post(
        "/v1/chat/completions", model=behind.base, messages=[{"role": "user", "content": "w5"}]
    )
    assert (chat.status_code, chat.json()["error"]["code"]) == (400, "chat_template")
    echo = behind.post("/v1/completions", model=behind.base, prompt="w5", echo=True, logprobs=1)
    assert echo.json()["error"]["code"] == "prompt_not_scored"
    long = behind.post("/v1/completions", model=behind.base, prompt=[5] * 5000, max_tokens=1)
    assert "exceed the encoder's limit" in long.json()["error"]["message"]
    with (
        Client(behind.url, api_key=behind.key) as client,
        pytest.raises(ApiError, match="hard_prompt on the base base"),
    ):
        client.upload_text("text", "w5 w6")
