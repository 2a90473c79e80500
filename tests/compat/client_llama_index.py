"""llama-index-llms-openai-like."""

from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from report import QUESTION, Report, is_weather


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


report = Report("llama-index-llms-openai-like")


def model(*, calls: bool) -> OpenAILike:
    return OpenAILike(
        model=report.model,
        api_base=report.url,
        api_key=report.key,
        is_chat_model=True,
        is_function_calling_model=calls,
        should_use_structured_outputs=not calls,
        temperature=0,
        max_tokens=96,
    )


llm, asked = model(calls=True), [ChatMessage(role="user", content=QUESTION)]


def weather(city: Literal["Oslo", "Rome", "Lima"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"{city} {unit}"


def tools() -> bool:
    tool = FunctionTool.from_defaults(weather)
    answer = llm.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    return is_weather(llm.get_tool_calls_from_response(answer)[0].tool_kwargs)


report.call("chat", lambda: llm.chat(asked).message.content)
report.call("stream_chat", lambda: [*llm.stream_chat(asked)][-1].message.content)
report.call("complete", lambda: llm.complete("One").text)
report.call("chat_with_tools", tools)
for calls, name in ((True, "tools"), (False, "json_schema")):
    report.call(
        f"as_structured_llm, {name}",
        lambda calls=calls: isinstance(
            model(calls=calls).as_structured_llm(Weather).chat(asked).raw, Weather
        ),
    )
report.end()
