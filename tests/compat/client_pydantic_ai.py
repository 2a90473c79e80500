"""pydantic-ai, with the three ways of structured output."""

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from report import QUESTION, Report


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


class AnyObject(BaseModel):
    """An object of the model's own."""

    model_config = ConfigDict(extra="allow")


report = Report("pydantic-ai-slim")
model = OpenAIChatModel(
    report.model, provider=OpenAIProvider(base_url=report.url, api_key=report.key)
)
SETTINGS = {"temperature": 0, "max_tokens": 96}


def run(output: object, kind: type[BaseModel] = Weather, question: str = QUESTION) -> bool:
    agent = Agent(model, output_type=output, model_settings=SETTINGS, retries=0)
    return isinstance(agent.run_sync(question).output, kind)


def text() -> str:
    return Agent(model, model_settings=SETTINGS).run_sync(QUESTION).output


report.call("text", text)
report.call("tool output", lambda: run(ToolOutput(Weather)))
report.call("native output", lambda: run(NativeOutput(Weather)))
# The schema is in the prompt alone, and the demo model does not follow it.
report.call("prompted output", lambda: run(PromptedOutput(AnyObject), AnyObject, "Oslo"))
report.end()
