"""The grammar of answers with calls, in the syntax that the model writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixd.server.api.answers.formats import SYNTAX, CallFormat
from prefixd.server.api.answers.reasoning import END_THINK, THINK
from prefixd.server.api.generate.schema_bounds import with_bounds
from prefixd.server.engine.constraint import Grammar, GrammarKind

_EXACT = {"lenient": False, "coerce_one_of": False}
_NO_ARGUMENTS = {"type": "object", "properties": {}}


def answer_rule(grammar: Grammar) -> str:
    """A schema or choices as a rule of another grammar."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            guidance = {**_EXACT, "whitespace_flexible": grammar.any_whitespace}
            return f"%json {json.dumps({**json.loads(grammar.source), 'x-guidance': guidance})}"
        case GrammarKind.CHOICE:
            return " | ".join(map(_text, json.loads(grammar.source)))
        case _:
            raise AssertionError(f"{grammar.kind} is no part of another grammar")


@dataclass(frozen=True, slots=True)
class AnswerGrammar:
    """Writes grammars of answers.

    ``calls`` is the format of calls; ``names_first`` as of the model's template; ``atomic`` has
    the ids of marks that are tokens without a text. ``several``: more than one call may
    come. ``reasons``: the model may think before; ``is_reasoning``: it has begun to.
    """

    calls: CallFormat | None
    atomic: Mapping[str, int]
    names_first: bool = False
    several: bool = True
    reasons: bool = False
    is_reasoning: bool = False

    def of(
        self,
        tools: Sequence[dict[str, Any]],
        answer: str | None = None,
        schemas: Sequence[tuple[str, str]] = (),
    ) -> Grammar:
        """The grammar of calls of these tools, of an ``answer`` (a rule), or of both. ``schemas``
        as of Grammar."""
        rules = [f"answer: {answer}"] if answer is not None else []
        parts = ["answer"] if answer is not None else []
        if tools:
            parts.append(self._calls())
            rules.append(f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}")
        for index, tool in enumerate(tools):
            rules += self._call(index, tool["function"])
        if self.reasons:
            rules += self._thought()
        start = f"start: {self._thinking()}({' | '.join(parts)})"
        return Grammar(GrammarKind.LARK, "\n".join([start, *rules]), schemas=tuple(schemas))

    def _thinking(self) -> str:
        if not self.reasons:
            return ""
        return "thought GAP " if self.is_reasoning else f"({self._mark(THINK)} thought GAP)? "

    def _thought(self) -> list[str]:
        if END_THINK in self.atomic:
            return [f"thought: /(?s:.*)/ {self._mark(END_THINK)}", r"GAP: /\n{0,2}/"]
        return [f"thought[suffix={_text(END_THINK)}]: /(?s:.*)/", r"GAP: /\n{0,2}/"]

    def _calls(self) -> str:
        assert self.calls is not None
        opener = self._mark(SYNTAX[self.calls].opener)
        match self.calls:
            case CallFormat.HERMES:
                return self._repeated("call", _text("\n"))
            case CallFormat.MISTRAL if self.names_first:
                return self._repeated("call", "")
            case CallFormat.MISTRAL:
                return f'{opener} " "? "[" {self._repeated("call", _text(", "))} "]"'
            case CallFormat.JSON:
                return f'"[" {self._repeated("call", _text(", "))} "]"'
            case CallFormat.LLAMA3:
                return "call"  # its template refuses turns with several

    def _repeated(self, rule: str, separator: str) -> str:
        return f"{rule} ({separator} {rule})*" if self.several else rule

    def _call(self, index: int, function: Mapping[str, Any]) -> list[str]:
        assert self.calls is not None
        syntax, name = SYNTAX[self.calls], json.dumps(function["name"])
        key = "parameters" if self.calls is CallFormat.LLAMA3 else "arguments"
        arguments = f"args_{index}"
        parts = [_text(f'{{"name": {name}, "{key}": '), arguments, _text("}")]
        opener, line = self._mark(syntax.opener), _text("\n")
        if self.calls is CallFormat.HERMES:
            parts = [opener, line, *parts, line, self._mark(syntax.closer)]
        elif self.calls is CallFormat.MISTRAL and self.names_first:
            parts = [opener, _text(function["name"]), self._mark("[ARGS]"), arguments]
        schema = json.dumps(_closed(function.get("parameters") or _NO_ARGUMENTS))
        return [f"call_{index}: {' '.join(parts)}", f"{arguments}: %json {schema}"]

    def _mark(self, mark: str) -> str:
        token_id = self.atomic.get(mark)
        return _text(mark) if token_id is None else f"<[{token_id}]>"


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the spaces that models are trained on, and without arguments that it does
    not name: a small model would not come to an end."""
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    closed = {"type": "object", **with_bounds(dict(schema)), "x-guidance": {**_EXACT, **spaces}}
    if schema.get("properties"):
        closed.setdefault("additionalProperties", False)
    return closed


def _text(text: str) -> str:
    return json.dumps(text)
