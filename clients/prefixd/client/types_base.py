"""What all models of responses share."""

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticUseDefault


class ResponseModel(BaseModel):
    """Base of all models: immutable, and no value is converted to another type."""

    model_config = ConfigDict(frozen=True, strict=True, populate_by_name=True)


def _default_if_null(value: object) -> object:
    if value is None:
        raise PydanticUseDefault
    return value


NullIsDefault = BeforeValidator(_default_if_null)
