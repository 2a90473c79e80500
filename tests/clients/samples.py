"""Responses of a server, for the client tests."""

from prefixd.client.types import CompletionChunk, Usage

MANIFEST = {
    "name": "triage",
    "version": 3,
    "digest": "ab" * 32,
    "kind": "soft_prompt",
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 12,
    "dtype": "float32",
    "size_bytes": 27648,
    "created_at": "2026-11-21T10:00:00+00:00",
    "base": "tiny",
    "base_model_name_or_path": "demo",
    "metadata": {"task_id": 1},
    "aliases": ["latest", "prod"],
    "a_field_of_next_year": 1,
}
USED = {"name": "triage", "version": 3, "digest": "ab" * 32}

TEXT_EVENTS = (
    'data: {"choices":[{"index":0,"text":"Grüß"}]}\n\n'
    'data: {"choices":[{"index":1,"text":"b"},'
    '{"index":0,"text":" dich","finish_reason":"stop"}]}\n\n'
    '{"index":0,"text":" dich","finish_reason":"stop"}]}\n\n'
    'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":3}}\n\n'
    "data: [DONE]\n\n"
    "data: never read\n\n"
).encode()
TEXT_CHUNKS = [
    CompletionChunk(text="Grüß", index=0),
    CompletionChunk(text="b", index=1),
    CompletionChunk(text=" dich", index=0, finish_reason="stop"),
    CompletionChunk(text="", index=0, usage=Usage(prompt_tokens=1, completion_tokens=3)),
]
