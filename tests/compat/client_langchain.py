"""langchain-openai."""

from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from report import QUESTION, TOOL, Report, is_weather


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


report = Report("langchain-openai")
chat = ChatOpenAI(
    base_url=report.url, api_key=report.key, model=report.model, temperature=0, max_tokens=96
)


def bind_tools() -> bool:
    answer = chat.bind_tools([TOOL], tool_choice="required").invoke(QUESTION)
    return is_weather(answer.tool_calls[0]["args"])


def streamed() -> bool:
    whole = None
    for chunk in chat.bind_tools([TOOL], tool_choice="weather").stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    return is_weather(whole.tool_calls[0]["args"])


def result() -> bool:
    asked = [HumanMessage(QUESTION)]
    first = chat.bind_tools([TOOL], tool_choice="required").invoke(asked)
    results = [ToolMessage("12 degrees", tool_call_id=call["id"]) for call in first.tool_calls]
    return bool(chat.invoke([*asked, first, *results]).content)


def structured(method: str) -> bool:
    return isinstance(chat.with_structured_output(Weather, method=method).invoke(QUESTION), Weather)


report.call("invoke", lambda: chat.invoke(QUESTION).content)
report.call("stream", lambda: "".join(chunk.content for chunk in chat.stream(QUESTION)))
report.call("bind_tools", bind_tools)
report.call("bind_tools, streamed", streamed)
report.call("ToolMessage", result)
for method in ("json_schema", "function_calling"):
    report.call(f"with_structured_output, {method}", lambda method=method: structured(method))
report.end()
