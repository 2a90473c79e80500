"""What clients of OpenAI's and vLLM's endpoints rely on, as rows: a request, and what must hold.

Sent through the official openai package. What differs on purpose is in docs/compatibility.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from prefixd.server.testing import VOCAB_SIZE
from tests.api.api_world import MAX_POSITIONS, World, fake_text, put_text
from tests.api.test_prompt_embeds import ONE, TWO, encoded, text_after, torch_save

PROMPT = "Hello"
IDS = list(PROMPT.encode())
TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1+1?"}]
RENDERED = "system: be brief\nuser: what is 1+1?\nassistant: "
TEXT = fake_text(None, PROMPT, 5)
CHAT = fake_text(None, RENDERED, 5)
USAGE = {"include_usage": True}
EACH = {"include_usage": True, "continuous_usage_stats": True}

RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "cold"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "strict": True,
            "properties": {"city": {"type": "string", "default": "Vienna"}},
            "required": [],
        },
    },
}
BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "foo": "bar"}}
TWO_KINDS = {"json": {"type": "object"}, "regex": ".*"}

Check = Callable[[Any], object]


@dataclass(frozen=True)
class Fact:
    """``holds`` of the answer to ``body``; of a stream it gets all chunks."""

    name: str
    body: dict[str, Any]
    holds: Check
    is_chat: bool = field(default=False)


def completion(name: str, holds: Check, **body: Any) -> Fact:
    return Fact(name, {"prompt": PROMPT, "max_tokens": 5, "temperature": 0, **body}, holds)


def chat(name: str, holds: Check, **body: Any) -> Fact:
    common = {"messages": TURNS, "max_completion_tokens": 5, "temperature": 0}
    return Fact(name, {**common, **body}, holds, is_chat=True)


def one(answer: Any) -> Any:
    (choice,) = answer.choices
    return choice


def text_of(chunks: Any, index: int = 0) -> str:
    pieces = [c for chunk in chunks for c in chunk.choices if c.index == index]
    return "".join((c.text if hasattr(c, "text") else c.delta.content) or "" for c in pieces)


def finishes(chunks: Any) -> list[str]:
    reasons = [c.finish_reason for chunk in chunks for c in chunk.choices]
    return [reason for reason in reasons if reason is not None]


def no_ids(answer: Any) -> bool:
    return one(answer).token_ids is None and one(answer).prompt_token_ids is None


def names_by_id(choice: Any) -> list[int]:
    return [int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens]


def top_sizes(answer: Any) -> set[int]:
    """Sizes of the tables behind the first token, which has none."""
    return set(map(len, one(answer).logprobs.top_logprobs[1:]))


def called(arguments: str) -> dict[str, Any]:
    """A past turn with a call."""
    function = {"name": "weather", "arguments": arguments}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def named(tool: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool}}


def adds_up(usage: Any) -> bool:
    return bool(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens)


def counts_up(chunks: Any) -> bool:
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    steps = pairwise(counts)
    return counts[-1] == 5 and all(a < b or (a == b == 5) for a, b in steps)


WHOLE = [
    completion("id", lambda a: a.id.startswith("cmpl-") and len(a.id) > 20),
    completion("object", lambda a: a.object == "text_completion"),
    completion("model", lambda a: a.model == "tiny"),
    completion("created", lambda a: isinstance(a.created, int) and a.created > 1_500_000_000),
    completion("one choice", lambda a: len(a.choices) == 1 and one(a).index == 0),
    completion("greedy text", lambda a: one(a).text == TEXT),
    completion("length", lambda a: one(a).finish_reason == "length"),
    completion("no stop reason", lambda a: one(a).stop_reason is None),
    completion(
        "usage counts", lambda a: (a.usage.prompt_tokens, a.usage.completion_tokens) == (5, 5)
    ),
    completion("usage adds up", lambda a: adds_up(a.usage)),
    completion("details", lambda a: a.usage.prompt_tokens_details.cached_tokens == 0),
    completion("no prefix of the base", lambda a: a.prefix is None),
    completion("token ids", lambda a: one(a).text == TEXT, prompt=IDS),
    completion("list of one text", lambda a: one(a).text == TEXT, prompt=[PROMPT]),
    completion("default of 16", lambda a: a.usage.completion_tokens == 16, max_tokens=None),
    completion("one token", lambda a: one(a).text == TEXT[:1], max_tokens=1),
    completion("no logprobs", lambda a: one(a).logprobs is None),
    completion("logprobs null", lambda a: one(a).logprobs is None, logprobs=None),
    completion("no prompt logprobs", lambda a: one(a).prompt_logprobs is None),
    completion(
        "logprobs 0: the sampled token",
        lambda a: len(one(a).logprobs.top_logprobs[0]) == 1,
        logprobs=0,
    ),
    completion("tokens join", lambda a: "".join(one(a).logprobs.tokens) == TEXT, logprobs=0),
    completion(
        "logprobs 5: at most one more",
        lambda a: all(5 <= len(t) <= 6 for t in one(a).logprobs.top_logprobs),
        logprobs=5,
    ),
    completion("logprobs 20", lambda a: len(one(a).logprobs.top_logprobs) == 5, logprobs=20),
    completion(
        "parallel lists",
        lambda a: (
            {
                len(one(a).logprobs.tokens),
                len(one(a).logprobs.token_logprobs),
                len(one(a).logprobs.top_logprobs),
                len(one(a).logprobs.text_offset),
            }
            == {5}
        ),
        logprobs=1,
    ),
    completion("offsets", lambda a: one(a).logprobs.text_offset == [0, 1, 2, 3, 4], logprobs=1),
    completion(
        "logprobs are no probabilities above 1",
        lambda a: all(value <= 0 for value in one(a).logprobs.token_logprobs),
        logprobs=1,
    ),
    completion("echo", lambda a: one(a).text == PROMPT + TEXT, echo=True),
    completion("echo without output", lambda a: one(a).text == PROMPT, echo=True, max_tokens=0),
    completion(
        "echo: the first has no logprob",
        lambda a: (
            one(a).logprobs.token_logprobs[0] is None
            and one(a).logprobs.top_logprobs[0] is None
            and len(one(a).logprobs.tokens) == 10
        ),
        echo=True,
        logprobs=1,
    ),
    completion("echo of token ids", lambda a: one(a).text == PROMPT + TEXT, prompt=IDS, echo=True),
    completion(
        "prompt logprobs of each prompt",
        lambda a: all(len(choice.prompt_logprobs) == 5 for choice in a.choices),
        prompt=[PROMPT, "World"],
        prompt_logprobs=1,
    ),
    completion("prompt logprobs 0", lambda a: len(one(a).prompt_logprobs) == 5, prompt_logprobs=0),
    completion("n", lambda a: [c.index for c in a.choices] == [0, 1, 2], n=3),
    completion(
        "n: usage", lambda a: a.usage.completion_tokens == 15 and a.usage.prompt_tokens == 5, n=3
    ),
    completion("n: finished", lambda a: all(c.finish_reason for c in a.choices), n=3),
    completion(
        "batch", lambda a: a.choices[0].text == a.choices[1].text == TEXT, prompt=[PROMPT] * 2
    ),
    completion(
        "batch of ids", lambda a: [c.text for c in a.choices] == [TEXT] * 2, prompt=[IDS, IDS]
    ),
    completion("batch times n", lambda a: len(a.choices) == 4, prompt=[PROMPT] * 2, n=2),
    completion(
        "batch times n: order",
        lambda a: (
            [c.text for c in a.choices] == [fake_text(None, p, 5) for p in ("a", "a", "b", "b")]
        ),
        prompt=["a", "b"],
        n=2,
    ),
    completion("stop", lambda a: one(a).text == TEXT[:2], stop=TEXT[2]),
    completion("stop: reason", lambda a: one(a).finish_reason == "stop", stop=TEXT[2]),
    completion("stop: which", lambda a: one(a).stop_reason == TEXT[2], stop=TEXT[2]),
    completion("stop list", lambda a: one(a).text == TEXT[:2], stop=["zzz", TEXT[2:4]]),
    completion("stop null", lambda a: one(a).text == TEXT, stop=None),
    completion("stop empty list", lambda a: one(a).text == TEXT, stop=[]),
    completion(
        "stop in the output",
        lambda a: one(a).text == TEXT[:3],
        stop=TEXT[2],
        include_stop_str_in_output=True,
    ),
    completion(
        "stop token", lambda a: one(a).stop_reason == ord(TEXT[2]), stop_token_ids=[ord(TEXT[2])]
    ),
    completion("stop token ids empty", lambda a: one(a).text == TEXT, stop_token_ids=[]),
    completion(
        "min_tokens keeps a stop token off",
        lambda a: a.usage.completion_tokens > 3,
        stop_token_ids=[ord(TEXT[2])],
        min_tokens=4,
    ),
    completion("seed", lambda a: one(a).text == TEXT, seed=42),
    completion("seed of 64 bits", lambda a: one(a).text == TEXT, seed=-(2**63)),
    completion("top_k -1", lambda a: one(a).text == TEXT, top_k=-1),
    completion("top_k 0", lambda a: one(a).text == TEXT, top_k=0),
    completion("min_p", lambda a: one(a).text == TEXT, min_p=0.0),
    completion("logit_bias", lambda a: one(a).text == TEXT, logit_bias={"7": 1.0}),
    completion(
        "highest token id", lambda a: one(a).text == TEXT, logit_bias={str(VOCAB_SIZE - 1): 1}
    ),
    completion("user", lambda a: one(a).text == TEXT, user="someone"),
    completion("best_of 1", lambda a: one(a).text == TEXT, best_of=1),
    completion("suffix null", lambda a: one(a).text == TEXT, suffix=None),
    completion("priority", lambda a: one(a).text == TEXT, priority=3),
    completion(
        "no beams", lambda a: one(a).text == TEXT, use_beam_search=False, length_penalty=1.0
    ),
    completion("prompt ids", lambda a: one(a).prompt_token_ids == IDS, return_token_ids=True),
    completion(
        "output ids", lambda a: one(a).token_ids == list(TEXT.encode()), return_token_ids=True
    ),
    completion("no ids", no_ids, return_token_ids=False),
    completion(
        "names by id are the ids",
        lambda a: names_by_id(one(a)) == one(a).prompt_token_ids + one(a).token_ids,
        echo=True,
        logprobs=1,
        prompt_logprobs=1,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    ),
    completion("likeliest of an echo", lambda a: top_sizes(a) <= {1, 2}, echo=True, logprobs=1),
    completion("likeliest of an echo, 0", lambda a: top_sizes(a) == {1}, echo=True, logprobs=0),
    completion(
        "structured outputs, choice",
        lambda a: (one(a).text, one(a).finish_reason) == ("ab", "stop"),
        structured_outputs={"choice": ["ab", "cd"]},
    ),
    completion(
        "structured outputs, regex",
        lambda a: re.fullmatch("[0-9]{3}", one(a).text),
        structured_outputs={"regex": "[0-9]{3}"},
    ),
    completion(
        "tokens named by id",
        lambda a: one(a).logprobs.tokens == [f"token_id:{byte}" for byte in TEXT.encode()],
        logprobs=1,
        return_tokens_as_token_ids=True,
    ),
    completion(
        "truncated left",
        lambda a: one(a).prompt_token_ids == IDS[-2:],
        truncate_prompt_tokens=2,
        return_token_ids=True,
    ),
    completion(
        "truncated right",
        lambda a: one(a).prompt_token_ids == IDS[:2],
        truncate_prompt_tokens=2,
        truncation_side="right",
        return_token_ids=True,
    ),
    completion(
        "embeds", lambda a: one(a).text == text_after(ONE, count=5), prompt=None, prompt_embeds=ONE
    ),
    completion(
        "batch of embeds",
        lambda a: [c.text for c in a.choices] == [text_after(e, count=5) for e in (ONE, TWO)],
        prompt=None,
        prompt_embeds=[ONE, TWO],
    ),
    completion(
        "embeds come first",
        lambda a: [c.text for c in a.choices] == [text_after(ONE, count=5), TEXT],
        prompt_embeds=ONE,
    ),
    completion(
        "embeds: no prompt logprobs",
        lambda a: one(a).prompt_logprobs is None,
        prompt=None,
        prompt_embeds=ONE,
    ),
    completion("no embeds", lambda a: one(a).text == TEXT, prompt_embeds=[]),
    completion(
        "embeds with logprobs",
        lambda a: len(one(a).logprobs.tokens) == 5,
        prompt=None,
        prompt_embeds=ONE,
        logprobs=0,
    ),
    chat("id", lambda a: a.id.startswith("chatcmpl-")),
    chat("object", lambda a: a.object == "chat.completion"),
    chat("role", lambda a: one(a).message.role == "assistant"),
    chat("content", lambda a: one(a).message.content == CHAT),
    chat("no refusal", lambda a: one(a).message.refusal is None),
    chat("no calls", lambda a: not one(a).message.tool_calls),
    chat("no function call", lambda a: getattr(one(a).message, "function_call", None) is None),
    chat("length", lambda a: one(a).finish_reason == "length"),
    chat(
        "usage",
        lambda a: (
            (a.usage.prompt_tokens, a.usage.total_tokens) == (len(RENDERED), len(RENDERED) + 5)
        ),
    ),
    chat(
        "max_tokens",
        lambda a: a.usage.completion_tokens == 3,
        max_completion_tokens=None,
        max_tokens=3,
    ),
    chat("max_completion_tokens wins", lambda a: a.usage.completion_tokens == 5, max_tokens=3),
    chat("no logprobs", lambda a: one(a).logprobs is None, logprobs=False),
    chat(
        "no top logprobs",
        lambda a: one(a).logprobs.content[0].top_logprobs == [],
        logprobs=True,
        top_logprobs=0,
    ),
    chat("logprobs alone", lambda a: len(one(a).logprobs.content) == 5, logprobs=True),
    chat(
        "five top logprobs",
        lambda a: len(one(a).logprobs.content[0].top_logprobs) == 5,
        logprobs=True,
        top_logprobs=5,
    ),
    chat(
        "bytes of tokens",
        lambda a: (
            bytes(b for entry in one(a).logprobs.content for b in entry.bytes) == CHAT.encode()
        ),
        logprobs=True,
    ),
    chat("n", lambda a: [c.index for c in a.choices] == [0, 1, 2], n=3, temperature=0.7),
    chat("n with a seed", lambda a: len(a.choices) == 2, n=2, seed=42, temperature=0.8),
    chat(
        "text parts",
        lambda a: one(a).message.content == CHAT,
        messages=[
            TURNS[0],
            {"role": "user", "content": [{"type": "text", "text": "what is 1+1?"}]},
        ],
    ),
    chat(
        "system parts",
        lambda a: one(a).message.content == CHAT,
        messages=[{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, TURNS[1]],
    ),
    chat(
        "developer",
        lambda a: one(a).message.content == CHAT,
        messages=[{"role": "developer", "content": "be brief"}, TURNS[1]],
    ),
    chat(
        "several turns",
        lambda a: a.usage.prompt_tokens > len(RENDERED),
        messages=[
            *TURNS,
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "why?"},
        ],
    ),
    chat("text format", lambda a: one(a).message.content == CHAT, response_format={"type": "text"}),
    chat("no tools", lambda a: one(a).message.content == CHAT, tools=[], tool_choice="none"),
    chat("tools null", lambda a: one(a).message.content == CHAT, tools=None, tool_choice=None),
    chat("stop", lambda a: one(a).message.content == CHAT[: CHAT.index(CHAT[2])], stop=CHAT[2]),
    chat("stop: which", lambda a: one(a).stop_reason == CHAT[2], stop=[CHAT[2]]),
    chat(
        "prompt ids",
        lambda a: bytes(a.prompt_token_ids).decode() == RENDERED,
        return_token_ids=True,
    ),
    chat("output ids", lambda a: bytes(one(a).token_ids).decode() == CHAT, return_token_ids=True),
    chat(
        "no ids",
        lambda a: a.prompt_token_ids is None and one(a).token_ids is None,
        return_token_ids=False,
    ),
    chat("prompt logprobs", lambda a: len(a.prompt_logprobs) == len(RENDERED), prompt_logprobs=1),
    chat("prompt logprobs 2", lambda a: len(a.prompt_logprobs[3]) in {2, 3}, prompt_logprobs=2),
    chat("no prompt logprobs", lambda a: a.prompt_logprobs is None),
    chat("top_logprobs 0 alone", lambda a: one(a).logprobs is None, top_logprobs=0),
    chat(
        "variables of the template",
        lambda a: one(a).message.content == CHAT,
        chat_template_kwargs={"enable_thinking": False},
    ),
    chat(
        "continued",
        lambda a: bytes(a.prompt_token_ids).decode().endswith("assistant: Sure"),
        messages=[*TURNS, {"role": "assistant", "content": "Sure"}],
        echo=False,
        continue_final_message=True,
        add_generation_prompt=False,
        return_token_ids=True,
    ),
    *[
        chat(
            f"{name} of a past turn",
            lambda a: a.choices,
            messages=[TURNS[1], {"role": "assistant", "content": "2", name: "easy"}, TURNS[1]],
        )
        for name in ("reasoning", "reasoning_content")
    ],
    *[
        chat(
            f"past call with {arguments!r}",
            lambda a: one(a).message.content,
            messages=[TURNS[1], called(arguments), RESULT],
        )
        for arguments in ("{}", "")
    ],
    chat(
        "named tool, cut",
        lambda a: one(a).finish_reason == "length" and one(a).message.tool_calls is None,
        tools=[TOOL],
        tool_choice=named("weather"),
        max_completion_tokens=1,
    ),
    chat(
        "required tool, cut",
        lambda a: one(a).finish_reason == "length" and one(a).message.tool_calls is None,
        tools=[TOOL],
        tool_choice="required",
        max_completion_tokens=1,
    ),
    chat(
        "tools and none", lambda a: one(a).message.content == CHAT, tools=[TOOL], tool_choice="none"
    ),
    chat(
        "structured outputs, choice",
        lambda a: one(a).message.content == "ab",
        structured_outputs={"choice": ["ab", "cd"]},
    ),
    chat(
        "finite logprobs in a structure",
        lambda a: all(t.logprob >= -9999 for t in one(a).logprobs.content[0].top_logprobs),
        structured_outputs={"choice": ["ab", "cd"]},
        logprobs=True,
        top_logprobs=5,
    ),
    chat(
        "metadata, store, tier",
        lambda a: one(a).message.content == CHAT,
        store=True,
        service_tier="auto",
    ),
    chat(
        "truncated left",
        lambda a: bytes(a.prompt_token_ids).decode() == RENDERED[-4:],
        truncate_prompt_tokens=4,
        return_token_ids=True,
    ),
]

STREAMS = [
    completion("joins to the whole", lambda s: text_of(s) == TEXT),
    completion("one finish reason", lambda s: finishes(s) == ["length"]),
    completion("finish with the last text", lambda s: s[-1].choices[0].text == TEXT[-1]),
    completion("one id", lambda s: len({chunk.id for chunk in s}) == 1),
    completion("object", lambda s: {chunk.object for chunk in s} == {"text_completion"}),
    completion("one choice a chunk", lambda s: all(len(chunk.choices) == 1 for chunk in s), n=2),
    completion("n", lambda s: [text_of(s, i) for i in range(3)] == [TEXT] * 3, n=3),
    completion("n: finishes", lambda s: finishes(s) == ["length"] * 3, n=3),
    completion("batch", lambda s: text_of(s, 0) == text_of(s, 1) == TEXT, prompt=[PROMPT] * 2),
    completion("no usage", lambda s: all(chunk.usage is None for chunk in s)),
    completion(
        "empty options", lambda s: all(chunk.usage is None for chunk in s), stream_options={}
    ),
    completion(
        "usage not wanted",
        lambda s: all(chunk.usage is None for chunk in s),
        stream_options={"include_usage": False, "continuous_usage_stats": True},
    ),
    completion(
        "usage at the end",
        lambda s: (
            s[-1].choices == [] and adds_up(s[-1].usage) and s[-1].usage.completion_tokens == 5
        ),
        stream_options=USAGE,
    ),
    completion(
        "usage at the end alone",
        lambda s: all(c.usage is None for c in s[:-1]),
        stream_options=USAGE,
    ),
    completion("usage in each", lambda s: all(adds_up(c.usage) for c in s), stream_options=EACH),
    completion("usage counts up", counts_up, stream_options=EACH),
    completion(
        "logprobs in each",
        lambda s: all(len(c.choices[0].logprobs.tokens) == 1 for c in s),
        logprobs=1,
    ),
    completion(
        "offsets go on",
        lambda s: [c.choices[0].logprobs.text_offset[0] for c in s] == [0, 1, 2, 3, 4],
        logprobs=0,
    ),
    completion(
        "prompt ids once",
        lambda s: (
            [getattr(c.choices[0], "prompt_token_ids", None) for c in s] == [IDS, *[None] * 4]
        ),
        return_token_ids=True,
    ),
    completion(
        "ids in each",
        lambda s: [t for c in s for t in c.choices[0].token_ids] == list(TEXT.encode()),
        return_token_ids=True,
    ),
    completion(
        "names by id are the ids",
        lambda s: all(names_by_id(c.choices[0]) == c.choices[0].token_ids for c in s),
        logprobs=1,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    ),
    completion(
        "offsets are those of the tokens where text is held back",
        lambda s: [o for c in s for o in c.choices[0].logprobs.text_offset] == [0, 1, 2, 3, 4],
        logprobs=0,
        stop=[TEXT[1] + "zz"],
    ),
    completion(
        "structured outputs, choice",
        lambda s: (text_of(s), finishes(s)) == ("ab", ["stop"]),
        structured_outputs={"choice": ["ab", "cd"]},
    ),
    completion("stop", lambda s: (text_of(s), finishes(s)) == (TEXT[:2], ["stop"]), stop=TEXT[2]),
    completion("echo", lambda s: text_of(s) == PROMPT + TEXT, echo=True),
    completion(
        "embeds",
        lambda s: text_of(s, 1) == text_after(TWO, count=5),
        prompt=None,
        prompt_embeds=[ONE, TWO],
    ),
    chat("role first", lambda s: s[0].choices[0].delta.role == "assistant"),
    chat("role once", lambda s: all(c.choices[0].delta.role is None for c in s[1:])),
    chat("object", lambda s: {chunk.object for chunk in s} == {"chat.completion.chunk"}),
    chat("joins to the whole", lambda s: text_of(s) == CHAT),
    chat("content is a text", lambda s: all(c.choices[0].delta.content is not None for c in s)),
    chat("no calls", lambda s: all(not c.choices[0].delta.tool_calls for c in s)),
    chat(
        "usage not wanted",
        lambda s: all(chunk.usage is None for chunk in s),
        stream_options={"include_usage": False},
    ),
    chat("one finish reason", lambda s: finishes(s) == ["length"]),
    chat("finish with the last text", lambda s: s[-1].choices[0].delta.content == CHAT[-1]),
    chat("n", lambda s: [text_of(s, i) for i in range(2)] == [CHAT] * 2, n=2),
    chat(
        "usage at the end",
        lambda s: s[-1].choices == [] and adds_up(s[-1].usage),
        stream_options=USAGE,
    ),
    chat("usage in each", lambda s: all(adds_up(c.usage) for c in s), stream_options=EACH),
    chat("usage counts up", counts_up, stream_options=EACH),
    chat(
        "prompt ids first",
        lambda s: bytes(s[0].prompt_token_ids).decode() == RENDERED,
        return_token_ids=True,
    ),
    chat(
        "prompt ids once",
        lambda s: all("prompt_token_ids" not in c.model_dump() for c in s[1:]),
        return_token_ids=True,
    ),
    chat(
        "logprobs",
        lambda s: sum(len(c.choices[0].logprobs.content) for c in s if c.choices[0].logprobs) == 5,
        logprobs=True,
    ),
]


@dataclass(frozen=True)
class Refusal:
    """``body`` is a 400 about ``param``, whose message has ``words``."""

    body: dict[str, Any]
    param: str | None
    words: str = ""
    is_chat: bool = False


def refused(param: str | None, words: str = "", **body: Any) -> Refusal:
    return Refusal({"prompt": PROMPT, **body}, param, words)


def refused_chat(param: str | None, words: str = "", **body: Any) -> Refusal:
    return Refusal({"messages": TURNS, **body}, param, words, is_chat=True)


REFUSALS = [
    refused("logprobs", "20", logprobs=21),
    refused("logprobs", "30", logprobs=30, stream=True),
    refused("logprobs", logprobs=-1),
    refused("prompt_logprobs", prompt_logprobs=-1),
    refused("prompt_logprobs", "stream", prompt_logprobs=1, stream=True),
    refused("prompt", "257", prompt=[999999]),
    refused("prompt", "0", prompt=[-1]),
    refused("prompt", prompt=[[-1]]),
    refused("prompt", "prompt_embeds", prompt=None),
    refused("prompt", "prompt_embeds", prompt=[]),
    refused("prompt", "prompt_embeds", prompt=None, prompt_embeds=[]),
    refused("prompt_embeds", "base64", prompt=None, prompt_embeds="invalid_base64"),
    refused("prompt_embeds", "safetensors", prompt=None, prompt_embeds=encoded(torch_save())),
    refused("prompt_embeds", "not compatible", prompt=None, prompt_embeds=ONE, prompt_logprobs=1),
    refused("prompt_embeds", "not compatible", prompt=None, prompt_embeds=ONE, echo=True),
    refused("stream_options", "stream", stream_options={"include_usage": None}),
    refused("stream_options", "stream", stream_options={"include_usage": True}),
    refused("stream_options", "stream", stream_options={"continuous_usage_stats": None}),
    refused("stream_options", "stream", stream_options={"continuous_usage_stats": True}),
    refused("seed", "9223372036854775807", seed=2**63),
    refused("temperature", "2", temperature=2.5),
    refused("top_p", "0", top_p=0),
    refused("n", "1", n=0),
    refused("max_tokens", max_tokens=-1),
    refused("min_tokens", "max_tokens", min_tokens=9, max_tokens=5),
    refused("best_of", "best_of", best_of=3),
    refused("suffix", "suffix", suffix="end"),
    refused("use_beam_search", "use_beam_search", use_beam_search=True),
    refused("logit_bias", "257", logit_bias={"258": 1.0}),
    refused("logit_bias", "logit_bias", logit_bias={"not_a_token_id": 50}),
    refused("logit_bias.1", "logit_bias", logit_bias={"1": "not_a_number"}),
    refused("logit_bias.1", "100", logit_bias={"1": 101}),
    refused("stop_token_ids", "257", stop_token_ids=[258]),
    refused("stop_token_ids[0]", "-1", stop_token_ids=[-1]),
    refused("response_format.json_schema", "json_schema", response_format={"type": "json_schema"}),
    refused("no_such_field", "unknown field", no_such_field=1),
    refused("max_tokens", "400", max_tokens=MAX_POSITIONS),
    refused("prompt", "400", prompt="x" * (MAX_POSITIONS + 1)),
    refused("structured_outputs", "$.properties.foo", structured_outputs={"json": BAD_SCHEMA}),
    refused("structured_outputs", structured_outputs={"regex": "[.*"}, stop=["\n"]),
    refused("structured_outputs", structured_outputs={"grammar": "root ::= select_invalid"}),
    refused("thinking_token_budget", thinking_token_budget=-2),
    refused("prompt_logprobs", prompt=None, prompt_embeds=ONE, prompt_logprobs=True),
    refused_chat("structured_outputs", "'json' and 'regex'", structured_outputs=TWO_KINDS),
    refused_chat("structured_outputs", "object", structured_outputs=3),
    refused_chat("structured_outputs.regex", "text", structured_outputs={"regex": {"1": "x"}}),
    refused_chat(
        "structured_outputs",
        "tool_choice",
        structured_outputs={"json": {"type": "object"}},
        tools=[TOOL],
        tool_choice=named("weather"),
    ),
    refused_chat("tool_choice", "tools", tool_choice="auto"),
    refused_chat("tool_choice", "tools", tool_choice="required", tools=None),
    refused_chat("tool_choice", "tools", tool_choice=named("weather")),
    refused_chat("tool_choice.type", "required", tools=[TOOL], tool_choice={}),
    refused_chat("tool_choice.function.name", "tools", tools=[TOOL], tool_choice=named("other")),
    refused_chat("logit_bias", "vocabulary of 257", logit_bias={"258": 1.0}),
    refused_chat("thinking_token_budget", thinking_token_budget=0.6),
    refused_chat("logprob_token_ids", logprobs=True, logprob_token_ids=[1]),
    refused_chat("cache_salt", cache_salt=""),
    refused_chat("top_logprobs", "20", logprobs=True, top_logprobs=21),
    refused_chat("top_logprobs", "20", logprobs=True, top_logprobs=30, stream=True),
    refused_chat("top_logprobs", "logprobs", top_logprobs=2),
    refused_chat("prompt_logprobs", prompt_logprobs=-1),
    refused_chat("seed", seed=-(2**63) - 1),
    refused_chat("stream_options", "stream", stream_options={"include_usage": True}),
    refused_chat("messages", "1", messages=[]),
    refused_chat("messages[0].content", "required", messages=[{"role": "user"}]),
    refused_chat("messages[0].role", "robot", messages=[{"role": "robot", "content": "x"}]),
    refused_chat("logit_bias", "257", logit_bias={"258": 1.0}),
    refused_chat("logit_bias", "logit_bias", logit_bias={"bad1": 50.0, "bad2": 20.0}),
    refused_chat("stop_token_ids", "257", stop_token_ids=[300]),
    refused_chat("response_format.json_schema", response_format={"type": "json_schema"}),
    refused_chat("max_completion_tokens", max_completion_tokens=0),
]


@pytest.fixture
def api(client: TestClient, world: World) -> openai.OpenAI:
    """The official client, on the application itself."""
    http: Any = client
    return openai.OpenAI(
        api_key=world.keys["acme"], base_url="http://testserver/v1", http_client=http, max_retries=0
    )


def send(api: openai.OpenAI, body: dict[str, Any], *, is_chat: bool, **options: Any) -> Any:
    create: Any = api.chat.completions.create if is_chat else api.completions.create
    own = ("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "stream")
    known = {name: value for name, value in body.items() if name in own}
    extra = {name: value for name, value in body.items() if name not in own}
    return create(**{"model": "tiny", **known}, extra_body={**extra, **options})


def test_whole_answers(api: openai.OpenAI) -> None:
    wrong = []
    for fact in WHOLE:
        answer = send(api, fact.body, is_chat=fact.is_chat, kv_reuse=False)
        if not fact.holds(answer):
            wrong.append((fact.name, fact.body, answer.to_dict()))
    assert not wrong


def test_streams(api: openai.OpenAI) -> None:
    wrong = []
    for fact in STREAMS:
        chunks = list(send(api, {**fact.body, "stream": True}, is_chat=fact.is_chat))
        if not fact.holds(chunks):
            wrong.append((fact.name, [chunk.to_dict() for chunk in chunks]))
    assert not wrong


def test_refusals(api: openai.OpenAI) -> None:
    wrong = []
    for refusal in REFUSALS:
        try:
            send(api, refusal.body, is_chat=refusal.is_chat)
        except openai.BadRequestError as error:
            said: Any = error.body
            if said["param"] != refusal.param or refusal.words not in said["message"]:
                wrong.append((refusal.body, said))
            continue
        wrong.append((refusal.body, "accepted"))
    assert not wrong
    assert send(api, WHOLE[0].body, is_chat=False).choices, "the server works afterwards"


def test_the_same_holds_under_a_prefix(
    api: openai.OpenAI, client: TestClient, world: World
) -> None:
    manifest = put_text(client, "voice", "Be kind.", world.headers())
    text = fake_text(manifest["digest"], PROMPT, 5)
    answer = send(api, {"prompt": PROMPT, "max_tokens": 5, "model": "voice"}, is_chat=False)
    assert (answer.choices[0].text, answer.model) == (text, "voice")
    assert answer.usage.prompt_tokens == 5
    assert "voice" in {model.id for model in api.models.list()}


def test_other_errors_of_the_client(api: openai.OpenAI, client: TestClient) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        send(api, {"prompt": "x", "model": "absent"}, is_chat=False)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        send(api.with_options(api_key="nonsense"), {"prompt": "x"}, is_chat=False)
    for raw in (b'"text"', b"[]", b"42", b"null", b"not json{{"):
        headers = {"content-type": "application/json"}
        for path in ("/v1/completions", "/v1/chat/completions"):
            assert client.post(path, content=raw, headers=headers).status_code == 400
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/v1/completions", content=b"prompt=x", headers=form).status_code == 400
