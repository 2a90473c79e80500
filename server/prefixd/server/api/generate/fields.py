"""What the bodies of completions and of chat completions share, with the names of OpenAI and vLLM.

Three groups of fields: those that work; those that are ignored because they do not change the
output; and those that are not supported, refused by name unless their value is neutral.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from prefixd.server.api.body import StrictModel
from prefixd.server.api.generate.compositions import ComposedPrefix
from prefixd.server.api.generate.logit_bias import LogitBias
from prefixd.server.api.generate.structure import StructureFields
from prefixd.server.api.generate.vllm_fields import VllmFields
from prefixd.server.api.values import User


def one_of(expected: str) -> WrapValidator:
    """A single error for a union, instead of one for each of its members."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("one_of", "{expected}", {"expected": expected}) from None

    return WrapValidator(check)


def misplaced(name: str, needed: str) -> PydanticCustomError:
    """The error of a field that needs another one."""
    return PydanticCustomError(
        "named",
        "'{name}': expected it only with {needed}; received it without",
        {"name": name, "needed": needed},
    )


NonEmpty = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]
Stop = Annotated[
    NonEmpty | Annotated[list[NonEmpty], Field(max_length=16)],
    one_of("a text or up to 16 texts, each of 1 to 1024 characters"),
]
Seed = Annotated[
    Annotated[int, Field(ge=-(2**63), lt=2**63)],
    one_of(f"a whole number from {-(2**63)} to {2**63 - 1}"),
]


class StreamOptions(StrictModel):
    """What a stream contains besides text."""

    include_usage: bool | None = Field(
        default=None, description="One more chunk before the end, with the token counts."
    )
    continuous_usage_stats: bool | None = Field(
        default=None, description="With `include_usage`: the counts so far in every chunk."
    )
    include_obfuscation: bool | None = Field(default=None, description="Ignored.")


class RequestFields(StrictModel):
    """Fields of the requests of all shapes that generate."""

    # Unsupported field -> its values that change nothing.
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str = Field(
        min_length=1,
        max_length=512,
        description="The base model's name, a prefix reference (`name`, `name@3`, `name@alias`), "
        "or `base:reference`.",
    )
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(
        default=None, description="Token id to a value added to its logit."
    )
    seed: Seed | None = Field(
        default=None, description="A signed 64-bit number, as in the OpenAI API and vLLM."
    )
    stream: bool | None = None

    top_k: int | None = Field(default=None, ge=-1, description="0 or -1: off.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=10, description="Below 0.01 logits would overflow."
    )
    ignore_eos: bool | None = Field(
        default=None, description="Continue after the model's own end of text."
    )
    min_tokens: int | None = Field(default=None, ge=0)
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    include_stop_str_in_output: bool | None = None

    priority: int | None = Field(
        default=None,
        ge=-(2**31),
        lt=2**31,
        description="The request of your tenant with the lowest value runs first. Default: 0.",
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds after which the request ends, complete or not. The server's own limit "
        "applies where it is lower.",
    )
    kv_reuse: bool | None = Field(
        default=None,
        description="Whether KV of equal prompt beginnings may be shared with your tenant's other "
        "requests. Default: true, if your tenant allows it.",
    )
    speculate: bool | None = Field(
        default=None,
        description="Whether several tokens may be verified in one pass, if the server does so. "
        "The answer is the same. Default: true.",
    )

    user: User | None = Field(
        default=None,
        description="Your end user. With the base as `model`, the prefix "
        "the user is bound to answers, else your default prefix, else the base.",
    )

    prefix: ComposedPrefix | None = Field(
        default=None,
        description="Several prefixes for this request, with the base as `model`: a `stack`, a "
        "`blend` or an `ensemble`. It wins over the prefix of the `user`.",
    )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema, with the unsupported fields and their neutral values."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, neutral in cls.NEUTRAL.items():
            properties[name] = {"enum": list(neutral), "description": "Not supported."}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in cls.NEUTRAL.items():
            if name in data and not _is_neutral(data[name], neutral):
                offered = " or ".join(_shown(value) for value in neutral)
                raise PydanticCustomError(
                    "unsupported",
                    "'{name}' is not supported by this server: leave it out, or send {offered}",
                    {"name": name, "offered": offered},
                )
        return {name: value for name, value in data.items() if name not in cls.NEUTRAL}


class GenerationFields(StructureFields, VllmFields, RequestFields):
    """Fields of completions and of chat completions."""

    n: int | None = Field(default=None, ge=1, le=128, description="Answers per prompt.")
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Stop | None = Field(
        default=None,
        description="Text, or up to 16 texts, that end the output and are not part of it.",
    )
    stream_options: StreamOptions | None = None

    return_token_ids: bool | None = Field(
        default=None, description="The token ids of prompt and output too."
    )
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Tokens of log-probabilities are named `token_id:123`."
    )

    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Log-probabilities of the prompt's tokens, each with the N likeliest there. "
        "Not with `stream`.",
    )

    metadata: dict[str, Any] | None = Field(default=None, description="Ignored.")
    store: bool | None = Field(default=None, description="Ignored: nothing is stored.")
    service_tier: str | None = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored.")
    prompt_cache_retention: str | None = Field(default=None, description="Ignored.")

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise misplaced("stream_options", "'stream': true")
        if self.prompt_logprobs is not None and self.stream:
            raise misplaced("prompt_logprobs", "'stream': false")
        return self

    @property
    def num_embedding_bytes(self) -> int:
        """Bytes of the body that are embeddings, which stay in memory while the request runs."""
        return 0

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_each_usage(self) -> bool:
        """Whether each chunk has the token counts so far."""
        options = self.stream_options
        return self.wants_usage and options is not None and bool(options.continuous_usage_stats)


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 1 == True and 0 == False in Python, but not in JSON.
    return any(type(value) is type(one) and value == one for one in neutral)


def _shown(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case _:
            return str(value).replace("'", '"') if value != "" else '""'
