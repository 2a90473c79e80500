"""The tokens part of the protocol: those that a request would have, and the text of tokens."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from prefixd.client.protocol_generation import Message
from prefixd.client.types import ResponseModel
from prefixd.client.wire import Call, Repeat, Request, Response, parse_body, parser, request_of


class Tokens(ResponseModel):
    """The tokens of a prompt or a conversation. ``num_virtual_tokens`` are those of the prefix,
    which are not among them, and ``max_model_len`` is the number of positions that it leaves."""

    tokens: Annotated[tuple[int, ...], Field(strict=False)]
    token_strs: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    count: int
    max_model_len: int
    num_virtual_tokens: int = 0


class _Detokenized(ResponseModel):
    prompt: str


def tokenize(
    prompt: str | None = None,
    *,
    messages: Sequence[Message] | None = None,
    model: str | None = None,
    user: str | None = None,
    add_special_tokens: bool | None = None,
    return_token_strs: bool | None = None,
) -> Call[Tokens]:
    """The tokens that a completion of ``prompt``, or a chat of ``messages``, would have under a
    prefix reference or the base. ``add_special_tokens`` False: those of the text alone."""
    fields = {
        "prompt": prompt,
        "messages": None if messages is None else list(messages),
        "model": model,
        "user": user,
        "add_special_tokens": add_special_tokens,
        "return_token_strs": return_token_strs,
    }
    return Call(_request("tokenize", fields), parser(Tokens))


def detokenize(
    tokens: Sequence[int], *, model: str | None = None, user: str | None = None
) -> Call[str]:
    """The text of tokens, special ones written out."""
    fields = {"tokens": list(tokens), "model": model, "user": user}
    return Call(_request("detokenize", fields), _text)


def _request(path: str, fields: Mapping[str, object]) -> Request:
    body = {name: value for name, value in fields.items() if value is not None}
    return request_of("POST", path, json=body, repeat=Repeat.LOST)


def _text(response: Response) -> str:
    return parse_body(_Detokenized, response).prompt
