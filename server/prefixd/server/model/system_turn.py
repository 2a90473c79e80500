"""The tokens that conversations under one system turn have in common.

They depend on the chat template and on the tokenizer: what follows the text may merge with its last
token, a template may put the date before it, or write it into the last turn of the user. So they
are found by comparing the tokens of conversations that differ in all of this, and each request
compares again.
"""

from collections.abc import Callable
from typing import Any

_QUESTION = {"role": "user", "content": "Hi"}
_PROBES: tuple[tuple[str, list[dict[str, str]]], ...] = (
    ("", [_QUESTION]),
    ("", [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, _QUESTION]),
    ("\n\nBe brief.", [_QUESTION]),
    (" ", [_QUESTION]),
)
"""What follows the text in the system turn, and the other turns."""

_ANOTHER_DAY = "{% macro strftime_now(format) %}~{% endmacro %}"


def common_tokens(
    text: str, *, template: Any, render: Callable[..., str], encode: Callable[[str], list[int]]
) -> list[int]:
    """The first tokens of all conversations whose system turn begins with ``text``.

    ``render`` is ``Tokenizer.render_chat``, and ``template`` what it renders. Raises ValueError as
    it does, and for a template that does not write the text.
    """
    variables: list[dict[str, Any]] = [{}]
    if isinstance(template, str) and "strftime_now" in template:
        variables.append({"chat_template": _ANOTHER_DAY + template})
    rendered = [
        render([{"role": "system", "content": text + more}, *turns], template_kwargs=each)
        for more, turns in _PROBES
        for each in variables
    ]
    if text.strip() not in rendered[0]:
        raise ValueError("the model's chat template does not write the text of a system turn")
    first, *others = map(encode, rendered)
    return first[: min(_num_equal(first, other) for other in others)]


def _num_equal(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
