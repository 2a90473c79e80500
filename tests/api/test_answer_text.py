"""Texts and log-probabilities over HTTP with real tokenizers; the model is a script."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.request import TokenLogprob
from prefixd.server.engine.step import Sampled, Step, StepOutput
from prefixd.server.model.tokenizer import Tokenizer
from tests.api.api_world import GatedRunner, make_world
from tests.model.tokenizer_kinds import byte_level, decode, expected_text, sentencepiece

PROMPT = "One day"


class ScriptedRunner(GatedRunner):
    """Writes the tokens of a script after a prompt of ``prompt_length`` tokens."""

    prompt_length = 0

    def __init__(self, script: Sequence[int], *, likely: Sequence[int] = ()) -> None:
        super().__init__()
        self._script = script
        self._likely = likely

    def run(self, step: Step) -> StepOutput:
        sampled: dict[int, Sequence[Sampled]] = {}
        for chunk in step.chunks:
            if chunk.sampling is not None:
                position = chunk.start + len(chunk.tokens) - self.prompt_length
                top = tuple(TokenLogprob(token, -1.0 - i) for i, token in enumerate(self._likely))
                wanted = chunk.sampling.top_logprobs
                token = self._script[position]
                logprob = next((t.logprob for t in top if t.token_id == token), -9.0)
                new = Sampled(
                    token,
                    logprob=None if wanted is None else logprob,
                    top_logprobs=top[: wanted or 0],
                )
                sampled[chunk.seq_id] = (new,)
        return StepOutput(sampled)


Complete = Callable[..., Any]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Complete]]:
    """``scripted(tokenizer, script)`` starts a server; its result completes a prompt."""
    with ExitStack() as stack:

        def start(inner: Any, script: Sequence[int], *, likely: Sequence[int] = ()) -> Complete:
            return stack.enter_context(serve(tmp_path, inner, script, likely))

        yield start


@contextmanager
def serve(
    tmp_path: Path, inner: Any, script: Sequence[int], likely: Sequence[int]
) -> Iterator[Complete]:
    runner = ScriptedRunner(script, likely=likely)
    with make_world(tmp_path, runner=runner, tokenizer=Tokenizer(inner)) as world:
        object.__setattr__(world.served, "vocab_size", len(inner))
        object.__setattr__(world.served, "eos_token_ids", frozenset({inner.eos_token_id}))
        with TestClient(world.app, headers=world.headers()) as client:

            def complete(prompt: str = PROMPT, **fields: Any) -> Any:
                is_chat = "messages" in fields
                runner.prompt_length = len(inner.encode(prompt, add_special_tokens=not is_chat))
                body = {"model": "tiny", "max_tokens": len(script), **fields}
                if not is_chat:
                    body["prompt"] = prompt
                path = "/v1/chat/completions" if is_chat else "/v1/completions"
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                return answer

            yield complete


def choice_of(answer: Any) -> Any:
    return answer.json()["choices"][0]


def chunks_of(answer: Any) -> list[Any]:
    frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame)["choices"][0] for frame in frames[:-1]]


def output_of(inner: Any, text: str) -> list[int]:
    """The tokens that ``text`` adds to the prompt."""
    ids: list[int] = inner.encode(PROMPT + text, add_special_tokens=False)
    return ids[len(inner.encode(PROMPT, add_special_tokens=False)) :]


def test_a_completion_keeps_the_space_it_begins_with(scripted: Any) -> None:
    inner = sentencepiece()
    text = " a time there was"
    complete = scripted(inner, output_of(inner, text))
    assert choice_of(complete())["text"] == text
    assert "".join(chunk["text"] for chunk in chunks_of(complete(stream=True))) == text
    stopped = choice_of(complete(stop=" a time"))
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


def test_a_completion_keeps_its_indentation(scripted: Any) -> None:
    inner = sentencepiece()
    complete = scripted(inner, 4 * [inner.convert_tokens_to_ids("\u2581")])
    assert choice_of(complete())["text"] == 4 * " "


def test_a_completion_of_no_text_begins_without_a_space(scripted: Any) -> None:
    inner = sentencepiece()
    complete = scripted(inner, inner.encode("One day in winter", add_special_tokens=False))
    choice = choice_of(complete("", logprobs=0))
    assert choice["text"] == "".join(choice["logprobs"]["tokens"]) == "One day in winter"


@pytest.mark.parametrize("stop", ["<|im_start|>", "<|im_start|>user", "d<|im_start|>us"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_in_a_stop_string_ends_the_text(
    scripted: Any, stop: str, *, stream: bool
) -> None:
    inner = byte_level()
    complete = scripted(inner, inner.encode(" hello world<|im_start|>user what"))
    answer = complete(stop=stop, stream=stream)
    choices = chunks_of(answer) if stream else [choice_of(answer)]
    expected = " hello world".removesuffix("d" if stop.startswith("d") else "")
    assert "".join(choice["text"] for choice in choices) == expected
    assert choices[-1]["finish_reason"] == "stop"
    written = choice_of(complete(stop=stop, include_stop_str_in_output=True))["text"]
    assert written == expected + stop


def test_a_stop_string_matches_a_word_after_a_special_token(scripted: Any) -> None:
    """SentencePiece puts a space before it, which is not in the stop string."""
    inner = sentencepiece(added=("<|im_start|>",))
    complete = scripted(inner, output_of(inner, " dog<|im_start|>user what"))
    for stop in ("<|im_start|>user", "<|im_start|> user", "dog<|im_start|>user"):
        choice = choice_of(complete(stop=stop))
        assert choice["text"] == " dog".removesuffix(stop.partition("<")[0])
        assert choice["finish_reason"] == "stop"


def test_the_end_of_text_is_a_stop_string_where_it_is_ignored(scripted: Any) -> None:
    inner = sentencepiece()
    dog, end = inner.convert_tokens_to_ids(["\u2581dog", "</s>"])
    complete = scripted(inner, [dog, end, dog, dog])
    assert choice_of(complete(ignore_eos=True))["text"] == " dog dog dog"
    choice = choice_of(complete(ignore_eos=True, stop="</s>"))
    assert (choice["text"], choice["finish_reason"]) == (" dog", "stop")
    choice = choice_of(complete(stop="g</s>"))
    assert (choice["text"], choice["finish_reason"]) == (" do", "stop")


def test_a_newline_that_is_a_byte_token_ends_the_text_at_once(scripted: Any) -> None:
    inner = sentencepiece()
    dog, newline = inner.convert_tokens_to_ids(["\u2581dog", "<0x0A>"])
    answer = scripted(inner, [dog, newline, dog])(stop="\n").json()
    assert answer["choices"][0]["text"] == " dog"
    assert answer["usage"]["completion_tokens"] == 2


def test_every_generated_token_has_log_probabilities(scripted: Any) -> None:
    """Also the end of the text, and the tokens of a stop string that is cut."""
    inner = byte_level()
    script = [*inner.encode(" there was a dog"), inner.eos_token_id]
    complete = scripted(inner, script)
    for fields in ({}, {"stop": "was a"}, {"max_tokens": 3}):
        answer = complete(logprobs=1, **fields).json()
        (choice,) = answer["choices"]
        logprobs, size = choice["logprobs"], answer["usage"]["completion_tokens"]
        assert all(len(column) == size for column in logprobs.values())
        assert all(offset <= len(choice["text"]) for offset in logprobs["text_offset"])
        chunks = [c["logprobs"] for c in chunks_of(complete(logprobs=1, stream=True, **fields))]
        for name, column in logprobs.items():
            assert [value for part in chunks if part for value in part[name]] == column
    assert complete(logprobs=1).json()["choices"][0]["logprobs"]["tokens"][-1] == "<|endoftext|>"


def test_tokens_with_the_same_text_are_all_in_the_table(scripted: Any) -> None:
    inner = byte_level()
    halves = inner.convert_tokens_to_ids(["\u00f0", "\u0141", "\u0142", "\u0143"])
    assert {decode(inner, [half]) for half in halves} == {"\ufffd"}
    complete = scripted(inner, [*halves, *inner.encode(" dog")], likely=halves)
    logprobs = choice_of(complete(logprobs=4))["logprobs"]
    for name, value, table in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert len(table) == (4 if name.startswith("bytes:") else 5)  # the sampled one is there
        assert table[name] == value
    assert logprobs["tokens"][0] == "bytes:\\xf0"


def test_alternatives_with_the_text_of_another_are_named_by_id(scripted: Any) -> None:
    inner = sentencepiece()
    letter, byte = inner.convert_tokens_to_ids(["a", "<0x61>"])
    complete = scripted(inner, [letter, byte], likely=[letter, byte])
    first, second = choice_of(complete(logprobs=2))["logprobs"]["top_logprobs"]
    assert first == {"a": -1.0, f"token_id:{byte}": -2.0}
    assert second == {f"token_id:{letter}": -1.0, "a": -2.0}


def test_bytes_of_a_message_join_to_its_text(scripted: Any) -> None:
    inner = sentencepiece()
    inner.chat_template = "{{ messages[0]['content'] }}"
    text = " na\u00efve \U0001f600!"
    output = output_of(inner, text)
    complete = scripted(inner, output)
    answer = complete(
        messages=[{"role": "user", "content": PROMPT}],
        logprobs=True,
        top_logprobs=0,
    )
    entries = choice_of(answer)["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
    assert [entry["top_logprobs"] for entry in entries] == [[]] * len(entries)
    assert expected_text(inner, inner.encode(PROMPT), output) == text
