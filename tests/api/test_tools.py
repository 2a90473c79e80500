"""Tools and reasoning over HTTP, with templates of several families; the model is a script."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.generate.tools.fields import ToolFields
from prefixd.server.engine.constraint import is_allowed
from prefixd.server.engine.step import Sampled, Step, StepOutput
from prefixd.server.model.grammar.compiler import LLGuidanceCompiler
from prefixd.server.model.grammar.source import Vocabulary
from prefixd.server.model.tokenizer import Tokenizer
from prefixd.server.serve.served_model import chat_traits
from tests.api import api_world
from tests.api.api_world import GatedRunner, World, error_of, make_world, put_text
from tests.api.chat_templates import tokenizer_of

USER = {"role": "user", "content": "hi"}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
CALLED = {"name": "weather", "arguments": '{"city": "Oslo"}'}
PAST = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a23456789", "type": "function", "function": CALLED}],
    },
    {"role": "tool", "tool_call_id": "a23456789", "content": "20"},
]


class Script(GatedRunner):
    """Writes the same tokens after any prompt, then an end; ``refused`` is whether a mask did not
    have one of them."""

    refused = False

    def __init__(self, token_ids: Sequence[int], end: int) -> None:
        super().__init__()
        self._script = [*token_ids, end]
        self._prompts: dict[int, int] = {}

    def run(self, step: Step) -> StepOutput:
        step.join_masks()
        sampled: dict[int, Sequence[Sampled]] = {}
        for chunk in step.chunks:
            if chunk.sampling is not None:
                length = chunk.start + len(chunk.tokens)
                place = length - self._prompts.setdefault(chunk.seq_id, length)
                wanted = chunk.sampling.top_logprobs
                token = self._script[min(place, len(self._script) - 1)]
                if chunk.mask is not None and not is_allowed(chunk.mask, token):
                    self.refused, token = True, self._script[-1]
                sampled[chunk.seq_id] = (Sampled(token, logprob=None if wanted is None else -1.0),)
        return StepOutput(sampled)


class Chat:
    """A server whose model writes one text."""

    def __init__(self, world: World, client: TestClient) -> None:
        self.client = client
        self.runner = world.runner
        self.prompts: list[str] = []
        tokenizer = world.served.tokenizer
        render = tokenizer.render_chat

        def record(*arguments: Any, **options: Any) -> str:
            self.prompts.append(render(*arguments, **options))
            return self.prompts[-1]

        tokenizer.render_chat = record  # type: ignore[method-assign]

    def post(self, **fields: Any) -> Any:
        body = {"model": "tiny", "messages": [USER], "max_tokens": 200, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def refuses(self, **fields: Any) -> bool:
        """Whether the grammar of a request has not the text of the model."""
        self.post(**fields)
        assert isinstance(self.runner, Script)
        return self.runner.refused

    def __call__(self, **fields: Any) -> Any:
        answer = self.post(**fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    def stream(self, **fields: Any) -> list[Any]:
        answer = self.post(stream=True, **fields)
        assert answer.status_code == 200, answer.text
        return chunks_of(answer)


def chunks_of(answer: Any) -> list[Any]:
    frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame)["choices"][0] for frame in frames[:-1]]


Writes = Callable[..., Chat]


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions and blocks for prompts with tools, in bytes."""
    monkeypatch.setattr(api_world, "POOL_BLOCKS", 256)
    monkeypatch.setattr(api_world, "MAX_POSITIONS", 4000)


@pytest.fixture
def world(tmp_path: Path, roomy: None) -> Iterator[World]:
    with make_world(tmp_path) as world:
        yield world


@pytest.fixture
def writes(tmp_path: Path, roomy: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writes]:
    """``writes(kind, text)`` starts a server of a family whose model writes ``text``."""
    with ExitStack() as stack:

        def start(kind: str, text: str, call_format: str = "auto") -> Chat:
            inner = tokenizer_of(kind)
            end = inner.eos_token_id
            vocabulary = Vocabulary(
                inner.backend_tokenizer.to_str(), len(inner), len(inner), (end,)
            )
            compiler = stack.enter_context(closing(LLGuidanceCompiler(lambda: vocabulary)))
            monkeypatch.setattr(api_world, "COMPILER", compiler)
            runner = Script(inner.encode(text, add_special_tokens=False), end)
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            world = stack.enter_context(
                make_world(folder, runner=runner, tokenizer=Tokenizer(inner))
            )
            changes = {
                "vocab_size": len(inner),
                "logits_size": len(inner),
                "eos_token_ids": frozenset({end}),
                "chat": chat_traits(inner, call_format),
            }
            for name, value in changes.items():
                object.__setattr__(world.served, name, value)
            client = stack.enter_context(TestClient(world.app, headers=world.headers()))
            return Chat(world, client)

        yield start


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message that the chunks of a stream make, as clients join them."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    for chunk in chunks:
        delta = chunk["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["calls"]):
                assert call["id"]
                assert call["type"] == "function"
                message["calls"].append([call["function"]["name"], ""])
            else:
                assert "id" not in call
                assert "name" not in call["function"]
            message["calls"][call["index"]][1] += call["function"]["arguments"]
    message["finish_reason"] = chunks[-1]["finish_reason"]
    return message


def in_message(choice: Any) -> dict[str, Any]:
    """The same of a whole response."""
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": [[call["name"], call["arguments"]] for call in calls],
        "finish_reason": choice["finish_reason"],
    }


ONE = [["weather", '{"city": "Oslo"}']]
WRITTEN = {
    "qwen2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}}]',
    "mistral, named": '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}',
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_calls_are_returned_whole_and_streamed(writes: Writes, kind: str) -> None:
    chat = writes(kind, WRITTEN[kind])
    choice = chat(tools=TOOLS)
    assert choice["message"]["content"] is None
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function"
    assert (len(call["id"]) == 9) if kind.startswith("mistral") else call["id"].startswith("call_")
    expected = {"content": "", "reasoning": "", "calls": ONE, "finish_reason": "tool_calls"}
    assert in_message(choice) == expected
    chunks = chat.stream(tools=TOOLS)
    assert joined(chunks) == expected
    assert sum("tool_calls" in chunk["delta"] for chunk in chunks) > 5, "arguments are not streamed"
    assert "weather" in chat.prompts[-1]
    assert "clock" in chat.prompts[-1]


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_conversation_with_calls_is_rendered_as_the_model_writes_it(
    writes: Writes, kind: str
) -> None:
    chat = writes(kind, "It is warm.")
    choice = chat(messages=PAST, tools=TOOLS)
    assert in_message(choice)["content"] == "It is warm."
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]
    written = WRITTEN[kind].removesuffix("}]")
    assert written in chat.prompts[-1], "past calls look otherwise than new ones"


def test_text_around_calls_is_content(writes: Writes) -> None:
    text = "Let me see.\n" + WRITTEN["qwen2.5"] + "\n" + WRITTEN["qwen2.5"]
    chat = writes("qwen2.5", text)
    choice = chat(tools=TOOLS)
    assert in_message(choice)["content"] == "Let me see."
    assert in_message(choice)["calls"] == ONE * 2
    assert joined(chat.stream(tools=TOOLS)) == in_message(choice)
    assert in_message(chat(tools=TOOLS, parallel_tool_calls=False))["calls"] == ONE
    assert joined(chat.stream(tools=TOOLS, parallel_tool_calls=False))["calls"] == ONE


def test_without_tools_the_text_is_unchanged(writes: Writes) -> None:
    choices: list[dict[str, Any]] = [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}]
    for fields in choices:
        chat = writes("qwen2.5", WRITTEN["qwen2.5"])
        assert in_message(chat(**fields))["content"] == WRITTEN["qwen2.5"]
        assert "weather" not in chat.prompts[-1]


def test_special_tokens_of_calls_are_not_in_a_text(writes: Writes) -> None:
    chat = writes("mistral", "a[TOOL_CALLS]b")
    assert in_message(chat())["content"] == "ab"
    assert in_message(chat(tools=TOOLS))["content"] == "a[TOOL_CALLS]b"


def test_tokens_of_a_conversation_with_tools_are_those_of_the_chat(writes: Writes) -> None:
    chat = writes("qwen2.5", "hi")
    ids = chat.post(tools=TOOLS, return_token_ids=True).json()["prompt_token_ids"]
    fields = {"messages": [USER], "tools": TOOLS}
    assert chat.client.post("/tokenize", json=fields).json()["tokens"] == ids
    assert "weather" in chat.prompts[-1]
    plain = writes("plain", "hi")
    ids = plain.post(messages=PAST, return_token_ids=True).json()["prompt_token_ids"]
    assert plain.client.post("/tokenize", json={"messages": PAST}).json()["tokens"] == ids
    wrong = chat.client.post("/tokenize", json={"prompt": "hi", "tools": TOOLS})
    assert error_of(wrong)["param"] == "tools"


def test_malformed_call_is_content(writes: Writes) -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": Oslo}}</tool_call>'
    chat = writes("qwen2.5", text)
    expected = {"content": text, "reasoning": "", "calls": [], "finish_reason": "stop"}
    assert in_message(chat(tools=TOOLS)) == expected
    streamed = joined(chat.stream(tools=TOOLS))
    assert (streamed["content"], streamed["finish_reason"]) == ("", "stop")


def test_a_cut_call_ends_with_length(writes: Writes) -> None:
    chat = writes("llama3", WRITTEN["llama3"])
    length = len(tokenizer_of("llama3").encode(WRITTEN["llama3"][:-8], add_special_tokens=False))
    choice = chat(tools=TOOLS, max_tokens=length)
    [[name, arguments]] = in_message(choice)["calls"]
    assert (name, choice["finish_reason"]) == ("weather", "length")
    assert '{"city": "Oslo"}'.startswith(arguments)
    assert joined(chat.stream(tools=TOOLS, max_tokens=length)) == in_message(choice)


def test_choices_have_calls_of_their_own(writes: Writes) -> None:
    chat = writes("mistral", WRITTEN["mistral"])
    choices = chat.post(tools=TOOLS, n=2).json()["choices"]
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in choices}
    assert len(ids) == 2
    chunks = chat.stream(tools=TOOLS, n=2)
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert joined(own)["calls"] == ONE


def test_log_probabilities_and_ids_are_those_of_all_tokens(writes: Writes) -> None:
    chat = writes("qwen2.5", WRITTEN["qwen2.5"])
    choice = chat(tools=TOOLS, logprobs=True, return_token_ids=True)
    chunks = chat.stream(tools=TOOLS, logprobs=True, return_token_ids=True)
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    streamed = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"]]
    assert [entry["token"] for part in streamed for entry in part] == tokens
    ids = [token for chunk in chunks for token in chunk.get("token_ids", [])]
    assert ids == choice["token_ids"]


REASONED = "<think>\nHm.\n</think>\n\nYes."


def test_reasoning_is_a_field_of_its_own(writes: Writes) -> None:
    chat = writes("qwen3", REASONED)
    choice = chat()
    assert choice["message"]["reasoning_content"] == "Hm."
    assert choice["message"]["content"] == "Yes."
    expected = {"content": "Yes.", "reasoning": "Hm.", "calls": [], "finish_reason": "stop"}
    assert joined(chat.stream()) == in_message(choice) == expected
    assert in_message(chat(include_reasoning=False)) == {**expected, "reasoning": ""}


def test_reasoning_that_the_template_begins(writes: Writes) -> None:
    chat = writes("thinks at once", "Hm.\n</think>\n\nYes." + WRITTEN["qwen2.5"])
    choice = chat(tools=TOOLS)
    expected = {"content": "Yes.", "reasoning": "Hm.", "calls": ONE, "finish_reason": "tool_calls"}
    assert joined(chat.stream(tools=TOOLS)) == in_message(choice) == expected
    answered = [USER, {"role": "assistant", "content": "Well,"}]
    text = in_message(chat(messages=answered, continue_final_message=True))["content"]
    assert text.startswith("Hm.\n</think>")


def test_thinking_is_switched_off_by_a_variable(writes: Writes) -> None:
    chat = writes("qwen3", "Yes.")
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        choice = chat(**fields)
        assert choice["message"]["content"] == "Yes."
        assert choice["message"]["reasoning_content"] is None
        assert chat.prompts[-1].endswith("<think>\n\n</think>\n\n")
    chat()
    assert chat.prompts[-1].endswith("assistant\n")


def test_messages_without_thinking_have_no_such_field(writes: Writes) -> None:
    assert "reasoning_content" not in writes("qwen2.5", "Yes.")()["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "auto"}, "tool_choice", "expected it with 'tools'; received it without"),
        ({"tool_choice": "required", "tools": []}, "tool_choice", "received it without"),
        ({"tool_choice": "any", "tools": TOOLS}, "tool_choice", "'required' or"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": TOOLS},
            "tool_choice.function.name",
            "one of the 'tools'",
        ),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice.function", "required"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].function.name", "each name once"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "custom tools are not supported"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "1 to 64 letters",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters.type",
            "type 'object'",
        ),
        (
            {"tools": [WEATHER], "parallel_tool_calls": "yes"},
            "parallel_tool_calls",
            "true or false",
        ),
        ({"tools": [CLOCK] * 129}, "tools", "at most 128"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"function_call": "auto"}, "function_call", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "expected 'none'"),
    ],
)
def test_invalid_tools_are_refused(
    writes: Writes, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = writes("qwen2.5", "x").post(**fields)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


def test_large_tools_are_refused() -> None:
    large = [function(name=f"f{i}", description="x" * 3000) for i in range(100)]
    with pytest.raises(ValueError, match="262144 bytes"):
        ToolFields.model_validate({"tools": large})


def test_auto_is_refused_where_the_model_cannot_choose(writes: Writes) -> None:
    for kind, call_format in (("plain", "auto"), ("qwen2.5", "none")):
        error = error_of(writes(kind, "x", call_format).post(tools=TOOLS))
        assert (error["code"], error["param"]) == ("tools_unsupported", "tool_choice")
        assert "'required'" in error["message"]


def test_setting_makes_a_plain_model_choose(writes: Writes) -> None:
    chat = writes("plain", '[{"name": "weather", "arguments": {"city": "Oslo"}}]', "json")
    assert in_message(chat(tools=TOOLS))["calls"] == ONE
    assert chat.prompts[-1].startswith("<|im_start|>system\nYou can call these functions:")
    chat(tools=TOOLS, messages=[{"role": "system", "content": "Be kind."}, USER])
    assert chat.prompts[-1].startswith("<|im_start|>system\nBe kind.\n\nYou can call")


@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("choice", ["required", "weather"])
def test_calls_that_must_come_are_constrained_to_the_format(
    writes: Writes, kind: str, choice: str
) -> None:
    named = function(name=choice) if choice != "required" else choice
    expected = {"content": "", "reasoning": "", "calls": ONE, "finish_reason": "tool_calls"}
    chat = writes(kind, WRITTEN[kind])
    assert in_message(chat(tools=TOOLS, tool_choice=named)) == expected
    assert joined(chat.stream(tools=TOOLS, tool_choice=named)) == expected
    assert not chat.refuses(tools=TOOLS, tool_choice=named)
    for text in ("Hello.", WRITTEN[kind].replace('"Oslo"', "3")):
        assert writes(kind, text).refuses(tools=TOOLS, tool_choice=named)


def test_several_calls_are_allowed_unless_refused(writes: Writes) -> None:
    text = f"{WRITTEN['qwen2.5']}\n{WRITTEN['qwen2.5']}"
    chat = writes("qwen2.5", text)
    assert in_message(chat(tools=TOOLS, tool_choice="required"))["calls"] == ONE * 2
    assert not chat.refuses(tools=TOOLS, tool_choice="required")
    assert chat.refuses(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)


def test_a_model_may_think_before_a_call_that_must_come(writes: Writes) -> None:
    expected = {"content": "", "reasoning": "Hm.", "calls": ONE, "finish_reason": "tool_calls"}
    thought = "Hm.\n</think>\n\n" + WRITTEN["qwen2.5"]
    for kind, text in (("qwen3", f"<think>\n{thought}"), ("thinks at once", thought)):
        chat = writes(kind, text)
        assert in_message(chat(tools=TOOLS, tool_choice="required")) == expected
        assert not chat.refuses(tools=TOOLS, tool_choice="required")
    choice = writes("qwen3", WRITTEN["qwen2.5"])(tools=TOOLS, tool_choice="required")
    assert in_message(choice)["calls"] == ONE


ANSWER = {"type": "json_object"}


def test_an_answer_in_a_format_may_be_calls_instead(writes: Writes) -> None:
    for text, calls in ((WRITTEN["qwen2.5"], ONE), ('{"a":1}', [])):
        choice = writes("qwen2.5", text)(tools=TOOLS, response_format=ANSWER)
        assert in_message(choice)["calls"] == calls
        assert in_message(choice)["content"] == ("" if calls else text)
    assert writes("qwen2.5", "no").refuses(tools=TOOLS, response_format=ANSWER)
    regex = {"structured_outputs": {"regex": "a+"}}
    error = error_of(writes("qwen2.5", "aa").post(tools=TOOLS, **regex))
    assert error["param"] == "tool_choice"
    choice = writes("qwen2.5", WRITTEN["qwen2.5"])(tools=TOOLS, tool_choice="required", **regex)
    assert in_message(choice)["calls"] == ONE


def test_a_model_may_think_before_an_answer_in_a_format(writes: Writes) -> None:
    choice = writes("thinks at once", 'Hm.\n</think>\n\n{"a":1}')(response_format=ANSWER)
    assert choice["message"]["reasoning_content"] == "Hm."
    assert choice["message"]["content"] == '{"a":1}'
    choice = writes("thinks at once", "aa")(structured_outputs={"regex": "a+"})
    assert choice["message"]["content"] == "aa"


PET = function(
    name="pet",
    parameters={
        "type": "object",
        "properties": {"kind": {"enum": ["dog", "cat"]}, "count": {"$ref": "#/$defs/count"}},
        "required": ["kind", "count"],
        "$defs": {"count": {"enum": [1, 2]}},
    },
)


@pytest.mark.parametrize("choice", ["required", function(name="pet")])
@pytest.mark.parametrize("model", ["tiny", "voice"])
def test_a_model_without_tools_calls_in_json(
    client: TestClient, world: World, model: str, choice: Any
) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    fields = {"tools": [PET], "tool_choice": choice, "parallel_tool_calls": False}
    body = {"model": model, "messages": [USER], "max_tokens": 60, **fields}
    whole = client.post("/v1/chat/completions", json=body)
    assert whole.status_code == 200, whole.text
    streamed = client.post("/v1/chat/completions", json={**body, "stream": True})
    for message in (in_message(whole.json()["choices"][0]), joined(chunks_of(streamed))):
        [[name, arguments]] = message["calls"]
        assert name == "pet"
        assert json.loads(arguments)["kind"] in {"dog", "cat"}
        assert set(json.loads(arguments)) == {"kind", "count"}
        assert (message["content"], message["finish_reason"]) == ("", "tool_calls")


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ({"type": "colour"}, ": "),
        ({"not": {}}, ": the keyword 'not' is not supported"),
        ({"uniqueItems": True}, ": the keyword 'uniqueItems' is not supported"),
        ({"maxItems": -1}, ".maxItems: expected a whole number from 0"),
        ({"x-guidance": {"lenient": True}}, ": the keyword 'x-guidance' is not supported"),
    ],
)
def test_schema_that_cannot_be_compiled_is_refused(
    client: TestClient, refused: dict[str, Any], said: str
) -> None:
    tool = function(name="f", parameters={"type": "object", "properties": {"a": refused}})
    body = {"model": "tiny", "messages": [USER], "tools": [CLOCK, tool], "tool_choice": "required"}
    form = {"response_format": {"type": "json_object"}}  # has no effect on a call that must come
    error = error_of(client.post("/v1/chat/completions", json={**body, **form}))
    assert (error["code"], error["param"]) == ("invalid_grammar", "tools")
    assert f"'tools': at tools[1].function.parameters.properties.a{said}" in error["message"]


def test_a_schema_behind_thinking_is_checked_as_one_without(writes: Writes) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    answer = writes("thinks at once", "x").post(structured_outputs={"json": schema})
    assert error_of(answer)["param"] == "structured_outputs"
    assert "at $.properties.a: the keyword 'not' is not supp" in error_of(answer)["message"]
