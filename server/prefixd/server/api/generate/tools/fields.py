"""Tools of a chat completion: functions that the model may call."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.shapes import refusal, unexpected

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNSUPPORTED_TYPES = {
    "custom": "custom tools are not supported; expected tools of type 'function'",
}


def _check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise refusal(
            "expected a name of 1 to 64 letters, digits, '_' and '-'; received a text of "
            f"{len(name)} characters that is none"
        )
    return name


def _check_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    if parameters and parameters.get("type", "object") != "object":
        raise refusal("expected the type 'object'; received another one", at=("type",))
    return parameters


FunctionName = Annotated[str, AfterValidator(_check_name)]
Parameters = Annotated[dict[str, Any], AfterValidator(_check_parameters)]


class FunctionDefinition(StrictModel):
    """A function: what it is for, and a JSON Schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: Parameters | None = Field(
        default=None, description="A JSON Schema of type `object`. Default: no arguments."
    )
    strict: bool | None = Field(
        default=None, description="Ignored: constrained calls always match the schema."
    )


class Tool(StrictModel):
    """A tool of the only type there is."""

    type: Literal["function"]
    function: FunctionDefinition

    @model_validator(mode="before")
    @classmethod
    def _refuse_types(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if isinstance(kind, str) and kind in _UNSUPPORTED_TYPES:
            raise refusal(_UNSUPPORTED_TYPES[kind], at=("type",), kind="unsupported_at")
        return data

    def variable(self) -> dict[str, Any]:
        """The tool as chat templates expect it: as sent, without what is ignored."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class _FunctionName(StrictModel):
    name: str


class NamedTool(StrictModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: _FunctionName


_CHOICES = ("none", "auto", "required")


def _check_choice(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    del validate
    if isinstance(value, NamedTool) or (isinstance(value, str) and value in _CHOICES):
        return value
    if isinstance(value, dict):
        if value.get("type") == "allowed_tools":
            raise refusal(
                "expected another choice; allowed_tools is not supported", kind="unsupported_at"
            )
        return NamedTool.model_validate(value)
    offered = '\'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": …}}'
    raise unexpected(offered, value, kind="unexpected_word")


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool, WrapValidator(_check_choice)
]


class ToolFields(StrictModel):
    """Which tools there are, and whether they must be called."""

    tools: list[Tool] | None = Field(
        default=None, max_length=MAX_TOOLS, description="Functions that the model may call."
    )
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`none`: call none; `auto`, the default with tools: call some or answer; "
        "`required`: call at least one; or the one to call.",
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="With false, at most one call. Default: true."
    )

    @property
    def called_tools(self) -> list[Tool]:
        """The tools that may be called: a named one alone, none with the choice `none`."""
        tools = self.tools or []
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in tools if tool.function.name == name]
        return tools

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def calls_once(self) -> bool:
        """Whether there is at most one call: a named tool is called once."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    @model_validator(mode="after")
    def _check_tools(self) -> "ToolFields":
        names = set[str]()
        for index, tool in enumerate(self.tools or []):
            name = tool.function.name
            if name in names:
                raise refusal(
                    f"expected each name once; received '{name}' several times",
                    at=("tools", index, "function", "name"),
                )
            names.add(name)
        size = len(json.dumps([tool.variable() for tool in self.tools or []]))
        if size > MAX_TOOLS_BYTES:
            raise refusal(
                f"expected at most {MAX_TOOLS_BYTES} bytes of tools; received {size}",
                at=("tools",),
            )
        return self._check_tool_choice(names)

    def _check_tool_choice(self, names: set[str]) -> "ToolFields":
        choice = self.tool_choice
        if choice in (None, "none"):
            return self
        if not names:
            raise refusal("expected it with 'tools'; received it without", at=("tool_choice",))
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise refusal(
                "expected the name of one of the 'tools'; received another",
                at=("tool_choice", "function", "name"),
            )
        return self
