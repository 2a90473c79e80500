"""Objects whose shape a field names; errors have the place of what is wrong.

pydantic's own unions put the name of a shape into the place, or report an error for each shape.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

Place = tuple[int | str, ...]


def shape_by(
    field: str, shapes: Mapping[str, type[BaseModel]], unsupported: Mapping[str, str] | None = None
) -> WrapValidator:
    """Validates an object as the shape that its ``field`` names. ``unsupported`` maps names of
    shapes that are refused to what is said of them."""
    offered = one_of_words(shapes)

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        del validate
        if isinstance(value, tuple(shapes.values())):
            return value
        if not isinstance(value, dict):
            raise unexpected("an object", value)
        kind = value.get(field)
        if not isinstance(kind, str):
            raise unexpected(offered, kind, at=(field,))
        if unsupported and kind in unsupported:
            raise refusal(unsupported[kind], at=(kind,), kind="unsupported_at")
        if kind not in shapes:
            raise unexpected(offered, kind, at=(field,), kind="unexpected_word")
        return shapes[kind].model_validate(value)

    return WrapValidator(check)


def unexpected(
    what: str, received: Any, *, at: Place = (), kind: str = "unexpected"
) -> ValidationError:
    """The error of a value ``at`` a place where something else was expected."""
    problem = PydanticCustomError(kind, "{what}", {"what": what})
    return _error(problem, at, received)


def refusal(sentence: str, *, at: Place = (), kind: str = "refused") -> ValidationError:
    """The error of a value ``at`` a place that a sentence explains."""
    problem = PydanticCustomError(kind, "{said}", {"said": sentence})
    return _error(problem, at, None)


def one_of_words(names: Mapping[str, object]) -> str:
    """``'a', 'b' or 'c'``."""
    *others, last = [f"'{name}'" for name in names]
    return f"{', '.join(others)} or {last}" if others else last


def _error(problem: PydanticCustomError, at: Place, received: Any) -> ValidationError:
    return ValidationError.from_exception_data(
        "value", [{"type": problem, "loc": at, "input": received}]
    )
