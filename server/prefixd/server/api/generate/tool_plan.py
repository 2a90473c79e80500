"""How the tools of a request become a prompt, a syntax to read and a grammar."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefixd.server.api.admitted import Admitted, AskedGrammar
from prefixd.server.api.answers.formats import CallFormat
from prefixd.server.api.answers.parser import AnswerSyntax
from prefixd.server.api.answers.reasoning import END_THINK, THINK
from prefixd.server.api.generate.conversation import ToolConversation
from prefixd.server.api.generate.tools.fields import ToolFields
from prefixd.server.api.generate.tools.grammar import AnswerGrammar, answer_rule
from prefixd.server.api.generate.tools.prompts import (
    Turn,
    with_instructions,
    without_tool_turns,
)
from prefixd.server.api.served import ChatTraits
from prefixd.server.engine.constraint import Grammar, GrammarKind
from prefixd.server.errors import BadRequest


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """``variables`` are the tools as the model's template gets them, ``described`` those that the
    system turn describes instead. ``calls`` is the format of calls, None where none are read."""

    traits: ChatTraits
    calls: CallFormat | None = None
    variables: list[dict[str, Any]] | None = None
    described: tuple[dict[str, Any], ...] = ()

    def turns(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns for the model's template."""
        if self.traits.renders_tools:
            return list(turns)
        plain = without_tool_turns(turns)
        return with_instructions(plain, self.described) if self.described else plain

    def complete(self, admitted: Admitted, body: ToolConversation, prompt: str) -> Admitted:
        """The request with what is read in its answers to a prompt that ends with ``prompt``, and
        with the grammar of calls. Raises BadRequest."""
        syntax = self.syntax(body, prompt)
        if syntax is None:
            return admitted
        asked = None if body.must_call else admitted.grammar
        if asked is not None and asked.grammar.kind in {GrammarKind.REGEX, GrammarKind.LARK}:
            if self.calls is not None:
                raise BadRequest(
                    "'tool_choice': expected 'none', 'required' or a tool next to a regex or a "
                    "grammar; received 'auto'",
                    param="tool_choice",
                )
            return admitted  # the grammar is that of the whole answer: no reasoning
        shown = self.traits.special.intersection(syntax.marks)
        requests = [replace(request, shown_special=shown) for request in admitted.requests]
        grammar = self._grammar(body, syntax, asked)
        param = "tools" if asked is None else asked.param
        return replace(
            admitted,
            requests=tuple(requests),
            syntax=syntax,
            grammar=None if grammar is None else AskedGrammar(grammar, param),
        )

    def syntax(self, body: ToolConversation, prompt: str) -> AnswerSyntax | None:
        """What to look for in answers to a prompt that ends with ``prompt``; None: nothing."""
        reasons = self.traits.reasons
        if self.calls is None and not reasons:
            return None
        return AnswerSyntax(
            calls=self.calls,
            names=frozenset(tool.function.name for tool in body.called_tools),
            max_calls=1 if body.calls_once else None,
            reasons=reasons,
            is_reasoning=reasons and _is_reasoning(body, prompt),
            shows_reasoning=body.include_reasoning is not False,
        )

    def _grammar(
        self, body: ToolConversation, syntax: AnswerSyntax, asked: AskedGrammar | None
    ) -> Grammar | None:
        """That of answers that must be calls, or calls or what is ``asked``; None: of any."""
        if not body.must_call and asked is None:
            return None
        writer = AnswerGrammar(
            self.calls,
            self.traits.atomic,
            names_first=self.traits.names_first,
            several=syntax.max_calls is None,
            reasons=syntax.reasons,
            is_reasoning=syntax.is_reasoning,
        )
        tools = body.called_tools if self.calls is not None else []
        schemas = [
            (f"tools[{index}].function.parameters", json.dumps(tool.function.parameters))
            for index, tool in enumerate(body.tools or [])
            if tool in tools and tool.function.parameters
        ]
        if asked is not None and asked.grammar.kind is GrammarKind.JSON_SCHEMA:
            schemas.append(("$", asked.grammar.source))
        answer = None if asked is None else answer_rule(asked.grammar)
        return writer.of([tool.variable() for tool in tools], answer, schemas)


def plan_tools(body: ToolFields, traits: ChatTraits) -> ToolPlan:
    """Raises BadRequest for tools that the model cannot be offered."""
    if not body.called_tools:
        return ToolPlan(traits)
    if traits.renders_tools and traits.call_format is not None:
        variables = [tool.variable() for tool in body.tools or []]
        return ToolPlan(traits, traits.call_format, variables)
    if not body.must_call and traits.call_format is not CallFormat.JSON:
        raise BadRequest(
            "'tool_choice': this model's chat template has no tools, or writes calls in a format "
            "that the server does not read, so it cannot choose; send 'required' or the name of "
            "a tool, 'none', or set the server's --tool-call-format",
            code="tools_unsupported",
            param="tool_choice",
        )
    described = tuple(tool.variable() for tool in body.called_tools)
    return ToolPlan(traits, CallFormat.JSON, described=described)


def _is_reasoning(body: ToolConversation, prompt: str) -> bool:
    """Whether the answer begins in the model's reasoning: the template ends with its mark, or the
    message that is continued has it."""
    if not body.continue_final_message:
        return prompt.rstrip().endswith(THINK)
    _, mark, tail = str(body.messages[-1].content).rpartition(THINK)
    return bool(mark) and END_THINK not in tail
