"""The turns of a conversation: what is accepted, how it is rendered, what errors say."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.served import ChatTraits
from prefixd.server.model.tokenizer import Tokenizer
from tests.api.api_world import World, error_of, fake_text
from tests.model.tokenizer_kinds import byte_level

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
SHOWN = "{% for m in messages %}{{ m | tojson }}\n{% endfor %}"


def chat(client: TestClient, messages: list[Any], **fields: Any) -> Any:
    body = {"model": "tiny", "messages": messages, "max_tokens": 6, **fields}
    return client.post("/v1/chat/completions", json=body)


def part(**fields: Any) -> list[Any]:
    return [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, fields]}]


def calling(**fields: Any) -> list[Any]:
    return [USER, {**CALLING, "tool_calls": [{**CALL, **fields}]}]


@pytest.mark.parametrize(
    ("messages", "param", "words"),
    [
        (
            [{"role": "robot", "content": "x"}],
            "[0].role",
            "'assistant' or 'tool'; received 'robot'",
        ),
        ([{"content": "x"}], "[0].role", "'system'"),
        (["hello"], "[0]", "expected an object; received a string of 5 characters"),
        ([{"role": "user"}], "[0].content", "required"),
        ([{"role": "user", "content": None}], "[0].content", "expected a text or a list of text"),
        ([USER, {"role": "assistant"}], "[1].content", "except in a turn with 'tool_calls'"),
        ([USER, {"role": "tool", "content": "x"}], "[1].tool_call_id", "required"),
        ([{**USER, "tool_calls": [CALL]}], "[0].tool_calls", "unknown field"),
        ([{**USER, "mood": "good"}], "[0].mood", "unknown field 'messages[0].mood'"),
        ([{**USER, "content": ["a"]}], "[0].content[0]", "an object; received a string of 1"),
        (part(type="image_url", image_url={}), "[1].content[1].image_url", "images are not"),
        (part(type="input_audio", input_audio={}), "[1].content[1].input_audio", "takes text"),
        (part(type="file", file={}), "[1].content[1].file", "files are not supported"),
        (part(type="text", text="a", mood="x"), "[1].content[1].mood", "unknown field"),
        (part(type="text", text=1), "[1].content[1].text", "received 1"),
        (part(type="prefix", to=1), "[1].content[1].from", "required"),
        (calling(type="custom"), "[1].tool_calls[0].type", "'function'; received 'custom'"),
        (calling(id=""), "[1].tool_calls[0].id", "at least 1"),
        (calling(function={"name": "f"}), "[1].tool_calls[0].function.arguments", "required"),
        (
            calling(function={"name": "f", "arguments": "[1]"}),
            "[1].tool_calls[0].function.arguments",
            "the JSON text of an object",
        ),
    ],
)
def test_invalid_message_is_refused_with_the_place(
    client: TestClient, messages: list[Any], param: str, words: str
) -> None:
    answer = chat(client, messages)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == f"messages{param}"
    assert words in error["message"]
    assert "Input should" not in error["message"]


def test_media_parts_have_the_code_of_unsupported_fields(client: TestClient) -> None:
    error = error_of(chat(client, part(type="image_url", image_url={"url": "x"})))
    assert error["code"] == "unsupported_field"
    assert error["message"] == (
        "'messages[1].content[1].image_url': this model takes text; images are not supported"
    )


def test_calls_and_results_are_turns(client: TestClient) -> None:
    answer = chat(client, [USER, CALLING, RESULT])
    calls = '[{"name": "f", "arguments": {"a": 1}}]'
    text = f"user: hi\nassistant: {calls}\nuser: Result of f: 42\nassistant: "
    assert answer.json()["choices"][0]["message"]["content"] == fake_text(None, text, 6)
    without_content = {name: CALLING[name] for name in ("role", "tool_calls")}
    assert chat(client, [USER, without_content, RESULT]).status_code == 200


def test_final_message_is_continued(client: TestClient) -> None:
    answer = chat(
        client, [USER, {"role": "assistant", "content": "Well, "}], continue_final_message=True
    )
    text = "user: hi\nassistant: Well, "
    assert answer.json()["choices"][0]["message"]["content"] == fake_text(None, text, 6)
    answer = chat(client, [USER], add_generation_prompt=False)
    assert answer.json()["choices"][0]["message"]["content"] == fake_text(None, "user: hi\n", 6)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"continue_final_message": True}, "continue_final_message", "message of the assistant"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "'add_generation_prompt'",
        ),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "set by the"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "set by"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs", "names of variables"),
        ({"chat_template_kwargs": {"a": "x" * 20000}}, "chat_template_kwargs", "16384 bytes"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "received a list of 0"),
    ],
)
def test_invalid_rendering_field_is_refused(
    client: TestClient, fields: dict[str, Any], param: str, words: str
) -> None:
    error = error_of(chat(client, [USER], **fields))
    assert error["param"] == param
    assert words in error["message"]


def rendered(client: TestClient, world: World, template: str, **fields: Any) -> str:
    """What a chat template makes of a request."""
    inner = byte_level()
    inner.chat_template = template
    texts: list[str] = []
    tokenizer = Tokenizer(inner)

    def render(*arguments: Any, **options: Any) -> str:
        texts.append(tokenizer.render_chat(*arguments, **options))
        return texts[-1]

    world.served.tokenizer.render_chat = render  # type: ignore[method-assign]
    object.__setattr__(world.served, "chat", ChatTraits(renders_tools=True))
    answer = chat(client, **{"messages": [USER, CALLING, RESULT], **fields})
    assert answer.status_code == 200, answer.text
    return texts[-1]


def test_template_gets_arguments_as_objects(client: TestClient, world: World) -> None:
    template = (
        "{% for m in messages %}{% if m.tool_calls is defined %}"
        "{% for c in m.tool_calls %}{{ c.id }} {{ c.function.name }} {{ c.function.arguments.a }}"
        "{% endfor %}{% elif m.role == 'tool' %}|{{ m.tool_call_id }}={{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert rendered(client, world, template) == "c1 f 1|c1=42"


def test_template_gets_the_variables_of_a_request(client: TestClient, world: World) -> None:
    template = "{{ mood }}{% if not thinks %} plain{% endif %}{{ add_generation_prompt }}"
    kwargs = {"mood": "happy", "thinks": False}
    text = rendered(client, world, template, chat_template_kwargs=kwargs)
    assert text == "happy plainTrue"
