"""What the output must be: OpenAI's ``response_format`` and vLLM's ``structured_outputs``."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from prefixd.server.api.admitted import AskedGrammar
from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.schema_bounds import with_bounds
from prefixd.server.api.generate.shapes import refusal
from prefixd.server.engine.constraint import Grammar, GrammarKind

MAX_CHOICES = 4096

_ANY_OBJECT = {"type": "object"}
_KINDS = ("json", "json_object", "regex", "choice", "grammar")

Text = Annotated[str, Field(min_length=1)]


class JsonSchemaFormat(StrictModel):
    """A JSON Schema that the answer must match."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="Ignored.")
    description: str | None = Field(default=None, description="Ignored.")
    schema_: dict[str, Any] = Field(
        alias="schema", description="docs/structured_output.md has the keywords."
    )
    strict: bool | None = Field(
        default=None, description="Ignored: the schema is always enforced in full."
    )


class ResponseFormat(StrictModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is None) == (self.type == "json_schema"):
            names = ("a schema", "none")
            expected, received = names if self.json_schema is None else names[::-1]
            raise refusal(
                f"expected {expected} with 'type': '{self.type}'; received {received}",
                at=("json_schema",),
            )
        return self

    @property
    def grammar(self) -> Grammar | None:
        """What it asks for; None: any text."""
        if self.type == "text":
            return None
        schema = _ANY_OBJECT if self.json_schema is None else self.json_schema.schema_
        return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(with_bounds(schema)))


class StructuredOutputs(StrictModel):
    """vLLM's ``structured_outputs``: exactly one of its kinds."""

    json_: dict[str, Any] | str | None = Field(
        default=None, alias="json", description="A JSON Schema, or its text."
    )
    json_object: Literal[True] | None = Field(default=None, description="Any JSON object.")
    regex: Text | None = Field(
        default=None, description="A regular expression that the whole output matches."
    )
    choice: list[Text] | None = Field(
        default=None, min_length=1, max_length=MAX_CHOICES, description="Texts, one of them."
    )
    grammar: Text | None = Field(
        default=None, description="A grammar in llguidance's dialect of Lark."
    )
    disable_any_whitespace: bool | None = Field(
        default=None,
        description="With false there may be whitespace between the parts of JSON. Default: true, "
        "so that there is none.",
    )

    @model_validator(mode="after")
    def _check_kinds(self) -> "StructuredOutputs":
        asked = [name for name in _KINDS if getattr(self, _attribute(name)) is not None]
        if len(asked) != 1:
            received = " and ".join(f"'{name}'" for name in asked) or "none"
            kinds = ", ".join(f"'{name}'" for name in _KINDS)
            raise refusal(f"expected exactly one of {kinds}; received {received}", at=())
        if isinstance(self.json_, str):
            _parsed(self.json_)
        return self

    @property
    def asked(self) -> Grammar:
        """What it asks for."""
        if self.regex is not None:
            return Grammar(GrammarKind.REGEX, self.regex)
        if self.choice is not None:
            return Grammar(GrammarKind.CHOICE, json.dumps(self.choice))
        if self.grammar is not None:
            return Grammar(GrammarKind.LARK, self.grammar)
        schema = _parsed(self.json_) if isinstance(self.json_, str) else self.json_
        return Grammar(
            GrammarKind.JSON_SCHEMA,
            json.dumps(_ANY_OBJECT if schema is None else with_bounds(schema)),
            any_whitespace=self.disable_any_whitespace is False,
        )


class StructureFields(StrictModel):
    """Fields of both kinds of request."""

    response_format: ResponseFormat | None = Field(
        default=None, description="`json_object`, or `json_schema` with a schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="As of vLLM. Not together with `response_format`."
    )

    @model_validator(mode="after")
    def _check_structure(self) -> "StructureFields":
        structured, response = self.structured_outputs, self.response_format
        if structured is None:
            return self
        if response is not None and response.grammar is not None:
            raise refusal(
                "expected one of 'response_format' and 'structured_outputs'; received both",
                at=("structured_outputs",),
            )
        return self

    @property
    def grammar(self) -> AskedGrammar | None:
        """What the output must be in; None: any text."""
        if self.structured_outputs is not None:
            return AskedGrammar(self.structured_outputs.asked, "structured_outputs")
        grammar = self.response_format.grammar if self.response_format is not None else None
        return None if grammar is None else AskedGrammar(grammar, "response_format")


def _attribute(name: str) -> str:
    return "json_" if name == "json" else name


def _parsed(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(
            "expected a JSON Schema, or its text; received a text that is not JSON", at=("json",)
        ) from error
    if not isinstance(schema, dict):
        raise refusal(
            "expected a JSON Schema that is an object; received another value", at=("json",)
        )
    return schema
