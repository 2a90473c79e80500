"""Tools through the official openai package, on a real socket; and on the demo model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.api import api_world
from tests.api.api_world import World, make_world
from tests.api.test_openai_client import api, url

__all__ = ["api", "url"]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "count": {"enum": [1, 2]}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
PET: Any = {"type": "function", "function": {"name": "pet", "parameters": SCHEMA}}
NAMED: Any = {"type": "function", "function": {"name": "pet"}}
ASKED: Any = [{"role": "user", "content": "A dog."}]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(api_world, "POOL_BLOCKS", 256)
    monkeypatch.setattr(api_world, "MAX_POSITIONS", 4000)
    with make_world(tmp_path) as world:
        yield world


def check_calls(client: openai.OpenAI, model: str) -> None:
    """Required and named calls, whole and streamed, and the turn with a result."""
    for choice in ("required", NAMED):
        fields: dict[str, Any] = {"tools": [PET], "tool_choice": choice, "temperature": 0}
        fields |= {"model": model, "messages": ASKED, "max_tokens": 96}
        whole = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
        assert whole.finish_reason == "tool_calls"
        assert whole.message.content is None
        [call] = whole.message.tool_calls
        assert call.function.name == "pet"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
        with client.chat.completions.stream(**fields, parallel_tool_calls=False) as stream:
            final: Any = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert final.message.tool_calls[0].function.arguments == call.function.arguments
        result = {"role": "tool", "tool_call_id": call.id, "content": "ok"}
        turns: Any = [*ASKED, whole.message, result]
        answer = client.chat.completions.create(model=model, messages=turns, max_tokens=4)
        assert answer.choices[0].message.content


def test_openai_client_calls_tools(api: openai.OpenAI) -> None:
    check_calls(api, "tiny")


def test_refusal_of_auto_reaches_the_openai_client(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="'required'") as refused:
        api.chat.completions.create(model="tiny", messages=ASKED, tools=[PET])
    assert refused.value.code == "tools_unsupported"


@pytest.mark.slow
@pytest.mark.demo_model
def test_calls_of_the_demo_model_match_their_schema(tmp_path: Path) -> None:
    admin(tmp_path, "tenant", "create", "acme")
    issued = admin(tmp_path, "key", "create", "--tenant", "acme")
    assert isinstance(issued, dict)
    folder = demo_model(default_cache_dir())
    with ServerProcess(data_dir=tmp_path, port=0, model=str(folder)) as server:
        address = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        with openai.OpenAI(base_url=f"{address}/v1", api_key=str(issued["key"])) as client:
            check_calls(client, client.models.list().data[0].id)
