"""How a version is to be called: its recipe, which its owner states and may change.

::

    {"prompt_template": "Text: {prompt} Label:", "input": "text", "temperature": 0, "max_tokens": 8,
     "stop": ["\\n"], "examples": [{"prompt": "Superb pasta.", "answer": "positive"}]}

It is part of the metadata: ``prompt_template`` is a field of its own there, the others are in the
field ``recipe``. Nothing that is compiled depends on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from prefixd.store.artifact.strict import shown
from prefixd.store.artifact.template import TemplateKind, template_kind
from prefixd.store.errors import ArtifactRefused

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_EXAMPLES = 16

TEMPLATE = "prompt_template"
RECIPE = "recipe"


class Input(StrEnum):
    """What a prefix was trained on: conversations in a chat template, or plain texts."""

    CHAT = "chat"
    TEXT = "text"


class Example(NamedTuple):
    """A prompt, and an answer that is right."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to call a version. None: the recipe does not say."""

    prompt_template: str | None = None
    input: Input | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    examples: tuple[Example, ...] = ()

    @property
    def template_kind(self) -> TemplateKind | None:
        """What its template is; None: there is none, or one that says nothing."""
        return None if self.prompt_template is None else template_kind(self.prompt_template)

    @property
    def takes(self) -> Input:
        """What stands for ``{prompt}`` in a chat: the user's text, or the whole conversation in the
        model's chat template. Without ``input``, a plain template takes the text."""
        if self.input is not None:
            return self.input
        return Input.TEXT if self.template_kind is TemplateKind.PLAIN else Input.CHAT


def folded(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata``, or a patch of it, with the template of ``recipe`` in the field of its own.
    Raises ArtifactRefused when that has another one."""
    fields = dict(metadata)
    recipe = fields.get(RECIPE)
    if not isinstance(recipe, dict) or TEMPLATE not in recipe:
        return fields
    rest = {name: value for name, value in recipe.items() if name != TEMPLATE}
    if fields.setdefault(TEMPLATE, recipe[TEMPLATE]) != recipe[TEMPLATE]:
        raise refused(
            "one prompt_template", "one in metadata and another in its recipe", field=TEMPLATE
        )
    return fields | {RECIPE: rest}


def read_recipe(metadata: Mapping[str, Any]) -> Recipe:
    """The recipe that metadata states, after ``folded``. Raises ArtifactRefused."""
    template = metadata.get(TEMPLATE)
    fields = metadata.get(RECIPE)
    if fields is None:
        return Recipe(prompt_template=template)
    if not isinstance(fields, dict):
        raise refused("an object", shown(fields))
    unknown = sorted(fields.keys() - _READERS.keys())
    if unknown:
        raise refused(f"the fields {TEMPLATE}, {', '.join(_READERS)}", shown(unknown[0]))
    values = {
        name: _READERS[name](value, name) for name, value in fields.items() if value is not None
    }
    return Recipe(prompt_template=template, **values)


def refused(expected: str, received: str, *, field: str | None = None) -> ArtifactRefused:
    """A recipe that is not accepted."""
    name = RECIPE if field is None else f"{RECIPE}.{field}"
    return ArtifactRefused(
        "malformed_recipe",
        f"expected {name} to be {expected}; got {received}",
        param=f"metadata.{name}",
    )


def _input(value: Any, name: str) -> Input:
    if value not in list(Input):
        raise refused(" or ".join(Input), shown(value), field=name)
    return Input(value)


def _temperature(value: Any, name: str) -> float:
    return _number(value, name, "a number from 0 to 2", lambda number: 0 <= number <= 2)


def _top_p(value: Any, name: str) -> float:
    return _number(value, name, "a number above 0 and at most 1", lambda number: 0 < number <= 1)


def _number(value: Any, name: str, expected: str, accepts: Any) -> float:
    if type(value) not in (int, float) or not accepts(value):
        raise refused(expected, _written(value), field=name)
    return float(value)


def _max_tokens(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise refused("a whole number from 1", _written(value), field=name)
    return value


def _stop(value: Any, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    is_valid = isinstance(texts, list) and len(texts) <= MAX_STOPS
    if not is_valid or not all(_is_stop(text) for text in texts):
        raise refused(
            f"a text or up to {MAX_STOPS} texts, each of 1 to {MAX_STOP_CHARACTERS} characters",
            shown(value),
            field=name,
        )
    return tuple(texts)


def _is_stop(text: object) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS


def _examples(value: Any, name: str) -> tuple[Example, ...]:
    if not isinstance(value, list) or len(value) > MAX_EXAMPLES:
        raise refused(f"a list of at most {MAX_EXAMPLES} examples", shown(value), field=name)
    for index, example in enumerate(value):
        is_example = isinstance(example, dict) and example.keys() == set(Example._fields)
        if not is_example or not all(isinstance(text, str) for text in example.values()):
            raise refused(
                'objects with the texts "prompt" and "answer"', f"another item {index}", field=name
            )
    return tuple(Example(**example) for example in value)


def _written(value: object) -> str:
    return repr(value) if type(value) is float else shown(value)


_READERS: dict[str, Any] = {
    "input": _input,
    "temperature": _temperature,
    "top_p": _top_p,
    "max_tokens": _max_tokens,
    "stop": _stop,
    "examples": _examples,
}
