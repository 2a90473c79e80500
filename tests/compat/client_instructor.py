"""instructor, in three modes."""

from typing import Literal

import instructor
import openai
from pydantic import BaseModel, ConfigDict
from report import QUESTION, Report


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome", "Lima"]
    unit: Literal["celsius", "fahrenheit"]


report = Report("instructor")
plain = openai.OpenAI(base_url=report.url, api_key=report.key)


class AnyObject(BaseModel):
    """An object of the model's own."""

    model_config = ConfigDict(extra="allow")


def create(mode: str, kind: type[BaseModel], question: str) -> bool:
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    answer = client.chat.completions.create(
        model=report.model,
        response_model=kind,
        messages=[{"role": "user", "content": question}],
        max_retries=0,
        max_tokens=96,
        temperature=0,
    )
    return isinstance(answer, kind)


for mode in ("TOOLS", "JSON_SCHEMA"):
    report.call(mode, lambda mode=mode: create(mode, Weather, QUESTION))
# The schema is in the prompt alone, and the demo model does not follow it.
report.call("JSON", lambda: create("JSON", AnyObject, "Oslo"))
report.end()
