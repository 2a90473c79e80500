"""Tokenizers with chat templates that write conversations as well-known families do."""

from functools import cache
from typing import Any

from tests.model.tokenizer_kinds import byte_level

_QWEN = """
{%- macro calls_of(m) -%}
{%- for c in m.tool_calls -%}
{{ '\\n' if not loop.first or m.content }}<tool_call>
{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
{%- endmacro -%}
{%- set first = messages[0] -%}
{%- if tools or first.role == 'system' -%}
<|im_start|>system
{{ first.content if first.role == 'system' else '' }}
{%- if tools %}
Functions:
<tools>
{%- for t in tools -%}
{{ '\\n' }}{{ t | tojson }}
{%- endfor -%}
{{ '\\n' }}</tools>
Calls are written <tool_call>{"name": …, "arguments": …}</tool_call>
{%- endif -%}
<|im_end|>
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif not (loop.first and m.role == 'system') -%}
<|im_start|>{{ m.role }}
{{ m.content }}{{ calls_of(m) if m.tool_calls }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}"""
_END = "{% endif -%}"

QWEN25 = _QWEN + _END
QWEN3 = (
    _QWEN + "{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}" + _END
)
THINKS_AT_ONCE = _QWEN + "{{- '<think>\\n' -}}" + _END + "{# until </think> #}"

LLAMA3 = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|start_header_id|>ipython<|end_header_id|>

{{ {'output': m.content} | tojson }}<|eot_id|>
{%- elif m.tool_calls -%}
{%- if m.tool_calls | length != 1 -%}{{ raise_exception('one call at a time') }}{%- endif -%}
{%- set f = m.tool_calls[0].function -%}
<|start_header_id|>assistant<|end_header_id|>

{"name": {{ f.name | tojson }}, "parameters": {{ f.arguments | tojson }}}<|eot_id|>
{%- else -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.last -%}
Answer with {"name": name of a function, "parameters": its arguments}.
{% for t in tools %}{{ t | tojson(indent=4) }}

{% endfor -%}
{%- endif -%}
{{ m.content }}<|eot_id|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""

_MISTRAL = """
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.last -%}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{%- endif -%}
[INST] {{ m.content }}[/INST]
{%- elif m.role == 'tool' -%}
[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls -%}
CALLS{{ eos_token }}
{%- else -%}
{{ ' ' + m.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
_LIST = """[TOOL_CALLS] [
{%- for c in m.tool_calls -%}
{%- if c.id | length != 9 -%}{{ raise_exception('ids have 9 characters') }}{%- endif -%}
{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson -}}
, "id": "{{ c.id }}"}
{{- ', ' if not loop.last -}}
{%- endfor -%}]"""
_NAMED = """
{%- for c in m.tool_calls -%}
[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}
{%- endfor -%}"""

MISTRAL = _MISTRAL.replace("CALLS{{", _LIST + "{{")
MISTRAL_NAMED = _MISTRAL.replace("CALLS{{", _NAMED + "{{")

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CHATML = ("<|im_start|>", "<|im_end|>")
_CALLS = ("<tool_call>", "</tool_call>")
_THINK = ("<think>", "</think>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")

_KINDS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "qwen2.5": (QWEN25, _CHATML, _CALLS),
    "qwen3": (QWEN3, _CHATML, (*_CALLS, *_THINK)),
    "thinks at once": (THINKS_AT_ONCE, _CHATML, (*_CALLS, *_THINK)),
    "llama3": (LLAMA3, (*_HEADERS, "<|python_tag|>"), ()),
    "mistral": (MISTRAL, (*_INST, "[/TOOL_RESULTS]", "[TOOL_CALLS]"), ()),
    "mistral, named": (MISTRAL_NAMED, (*_INST, "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[ARGS]"), ()),
    "plain": (PLAIN, _CHATML, ()),
}


@cache
def tokenizer_of(kind: str) -> Any:
    """A byte-level tokenizer with the marks of a family, and its template."""
    template, special, words = _KINDS[kind]
    tokenizer = byte_level(added=special, words=words)
    tokenizer.chat_template = template.strip()
    tokenizer.bos_token = "<|begin_of_text|>" if kind == "llama3" else "<|endoftext|>"
    return tokenizer
