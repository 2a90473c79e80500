"""What Open WebUI sends to a server of OpenAI's API, replayed with the HTTP library that it uses.

Open WebUI itself is a web application of several GB. The calls are those of its version below: the
list of models, chats and the small tasks around them, with and without the headers of its users.
The server needs ``--user-header X-OpenWebUI-User-Id`` and ``--tool-call-format json``.
"""

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
from report import QUESTION, TOOL, USERS, Report

VERSION = "0.12.4"
ANN, BOB = USERS

report = Report(version=VERSION)
PARAMETERS = {"max_tokens": 32, "temperature": 0}
HISTORY = [
    {"role": "system", "content": "The user lives in Oslo."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I help you?"},
    {"role": "user", "content": QUESTION},
]
# What it keeps of a call that the model made earlier: no null, and no other fields.
CALLED = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_0d5d1d2f",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Oslo", "unit": "celsius"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_0d5d1d2f", "content": "12 degrees"},
]
# Two of its own tools, which it offers in each chat of its page.
OWN_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_timestamp",
            "description": "The time now.",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "search_chats",
            "description": "Search past chats.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to search."},
                    "count": {"type": "integer", "default": 5},
                    "start_timestamp": {"type": "integer", "description": "From this time on."},
                },
                "required": ["query"],
            },
        },
    },
]
TASKS = {
    "title": "### Task:\nWrite a title of 3 to 5 words.\n### Output:\n"
    'JSON: { "title": "your title here" }\n### Chat History:\n<chat_history>\n{}\n</chat_history>',
    "tags": "### Task:\nWrite 1 to 3 tags.\n### Output:\n"
    'JSON: { "tags": ["tag1", "tag2"] }\n### Chat History:\n<chat_history>\n{}\n</chat_history>',
    "follow-ups": "### Task:\nSuggest 3 questions that the user may ask next.\n### Output:\n"
    'JSON: { "follow_ups": ["Question?"] }\n### Chat History:\n<chat_history>\n{}\n</chat_history>',
    "search queries": "### Task:\nWrite search queries.\n### Output:\n"
    '{ "queries": ["query"] }\n### Chat History:\n<chat_history>\n{}\n</chat_history>',
    "autocompletion": "### Task:\nContinue the text.\n### Output:\n"
    '{ "text": "<completion>" }\n### Context:\n<context>\n{}\n</context>',
}


def headers(user: str | None = None, *, key: str = report.key) -> dict[str, str]:
    """Of each request; those of a user with ENABLE_FORWARD_USER_INFO_HEADERS."""
    named = {
        "X-OpenWebUI-User-Name": "Zo%C3%AB Example",
        "X-OpenWebUI-User-Id": user,
        "X-OpenWebUI-User-Email": "zoe@example.com",
        "X-OpenWebUI-User-Role": "user",
        "X-OpenWebUI-Auth-Type": "jwt",
        "X-OpenWebUI-Chat-Id": "3a1f1f2e-57a0-4a6e-9d0e-3a5c2a1d7f10",
    }
    return {
        "Content-Type": "application/json",
        **(named if user else {}),
        "Authorization": f"Bearer {key}",
    }


async def models(**of: str) -> tuple[int, dict]:
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        session.get(f"{report.url}/models", headers=headers(**of)) as answer,
    ):
        return answer.status, await answer.json()


def post(session: aiohttp.ClientSession, body: dict[str, object], user: str | None) -> object:
    url = f"{report.url}/chat/completions"
    return session.post(url, data=json.dumps(body), headers=headers(user))


async def chat(user: str | None = None, **fields: object) -> dict:
    body = {"stream": False, "model": report.model, **PARAMETERS, **fields}
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        post(session, body, user) as answer,
    ):
        content = await answer.json()
        assert answer.status == 200, content
        return content


async def stream(user: str | None = None, **fields: object) -> AsyncIterator[dict]:
    """The chunks, read as it reads them: lines that begin with ``data:``."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": report.model, **options, **PARAMETERS, **fields}
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        post(session, body, user) as answer,
    ):
        assert answer.status == 200, await answer.text()
        assert "text/event-stream" in answer.headers["Content-Type"]
        async for line in answer.content:
            text = line.decode().strip()
            if text.startswith("data:") and not text.startswith("data: [DONE]"):
                yield json.loads(text[len("data:") :])


async def read(chunks: AsyncIterator[dict]) -> tuple[str, list[dict], dict]:
    """Text, calls joined by their index, and usage."""
    text, calls, usage = "", {}, {}
    async for chunk in chunks:
        assert "error" not in chunk, chunk
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"][:1]:
            text += choice["delta"].get("content") or ""
            for delta in choice["delta"].get("tool_calls") or []:
                if delta["index"] not in calls:
                    calls[delta["index"]] = {"id": delta["id"], "name": "", "arguments": ""}
                function = delta["function"]
                calls[delta["index"]]["name"] = (
                    function.get("name") or calls[delta["index"]]["name"]
                )
                calls[delta["index"]]["arguments"] += function.get("arguments") or ""
    return text, list(calls.values()), usage


async def connection() -> bool:
    status, content = await models()
    return status == 200 and isinstance(content["data"], list)


async def wrong_key() -> bool:
    status, content = await models(key="nonsense")
    return status == 401 and bool(content["error"]["message"])


async def listed() -> bool:
    _, content = await models(user=ANN)
    return report.model in [model["id"] for model in content["data"]]


async def streamed() -> bool:
    text, _, usage = await read(stream(messages=HISTORY))
    return (
        bool(text) and usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    )


async def whole() -> bool:
    answer = await chat(messages=HISTORY)
    return bool(answer["choices"][0]["message"]["content"]) and answer["usage"]["total_tokens"] > 0


async def controls() -> bool:
    controls = {
        "seed": 7,
        "stop": ["\n\n"],
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "temperature": 0.8,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "logit_bias": {"100": -5, "200": 5},
        "reasoning_effort": "none",
        "response_format": {"type": "json_object"},
    }
    text, _, _ = await read(stream(messages=HISTORY, **{**controls, "max_tokens": 64}))
    return text.startswith("{")


async def with_parts() -> bool:
    parts = [{"type": "text", "text": QUESTION}]
    text, _, _ = await read(stream(messages=[{"role": "user", "content": parts}]))
    return bool(text)


async def go_on() -> bool:
    """Its button that continues an answer: the last turn is the assistant's."""
    text, _, _ = await read(stream(messages=HISTORY[:3]))
    return bool(text)


async def stop() -> bool:
    """Its button that ends an answer closes the connection; the server answers the next one."""
    chunks = stream(messages=HISTORY, max_tokens=512)
    await anext(chunks)
    await chunks.aclose()
    return await whole()


async def task(prompt: str) -> bool:
    content = prompt.replace("{}", f"USER: {QUESTION}\nASSISTANT: 12 degrees")
    answer = await chat(messages=[{"role": "user", "content": content}])
    return bool(answer["choices"][0]["message"]["content"])


async def native_tools() -> bool:
    """Text or calls, as the model decides; calls with what it needs to run them."""
    text, calls, _ = await read(stream(messages=HISTORY, tools=[*OWN_TOOLS, TOOL], max_tokens=96))
    offered = {tool["function"]["name"] for tool in (*OWN_TOOLS, TOOL)}
    return bool(text or calls) and all(
        call["id"] and call["name"] in offered and isinstance(json.loads(call["arguments"]), dict)
        for call in calls
    )


async def native_results() -> bool:
    messages = [*HISTORY, *CALLED]
    text, calls, _ = await read(stream(messages=messages, tools=[*OWN_TOOLS, TOOL], max_tokens=96))
    return bool(text or calls)


async def legacy_tools() -> bool:
    """The tools in a system turn, before the chat itself."""
    turns = [
        {"role": "system", "content": f"Available Tools: {json.dumps([TOOL['function']])}"},
        {"role": "user", "content": f'History:\nUSER: """Hello"""\nQuery: {QUESTION}'},
    ]
    answer = await chat(messages=turns)
    return bool(answer["choices"][0]["message"]["content"])


async def prefixes_of_users() -> bool:
    """Each person gets the prefix that they are bound to; they choose the base."""
    _, content = await models(user=ANN)
    base = content["data"][0]["id"]
    used = {}
    for user in USERS:
        answer = await chat(user, model=base, messages=HISTORY)
        used[user] = answer["prefix"]["name"]
    text, _, _ = await read(stream(BOB, model=base, messages=HISTORY))
    return used == USERS and bool(text)


CALLS = {
    "connection check": connection,
    "connection check, wrong key": wrong_key,
    "list of models": listed,
    "chat, streamed, with usage": streamed,
    "chat, whole": whole,
    "chat with parts": with_parts,
    "chat controls": controls,
    "continue an answer": go_on,
    "stop an answer": stop,
    **{f"task: {name}": lambda prompt=prompt: task(prompt) for name, prompt in TASKS.items()},
    "tools, native": native_tools,
    "tools, native, results": native_results,
    "tools, legacy": legacy_tools,
    "prefix of each user": prefixes_of_users,
}
for name, run in CALLS.items():
    report.call(name, lambda run=run: asyncio.run(run()))
report.end()
