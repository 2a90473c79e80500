"""Log-probabilities in the two formats of OpenAI.

Tokens are distinguished by id: two tokens with the same text are two entries. A token that is part
of a character is written as its bytes, as OpenAI writes it.
"""

from collections.abc import Sequence
from math import isnan
from typing import Any

from prefixd.server.api.served import Tokenizer
from prefixd.server.engine.request import PositionLogprobs, TokenLogprob

# JSON has no minus infinity; vLLM sends this number instead.
_LOWEST_LOGPROB = -9999.0


def completion_logprobs(
    positions: Sequence[PositionLogprobs], tokenizer: Tokenizer, *, by_id: bool = False
) -> dict[str, Any]:
    """The object ``logprobs`` of a completion: parallel lists, one entry for each position.
    ``by_id``: tokens are named by their ids. A token without a log-probability (NaN), before which
    nothing comes, has null and no table."""
    tables = [_table(position, tokenizer, by_id=by_id) for position in positions]
    return {
        "tokens": [name for name, _ in tables],
        "token_logprobs": [_or_null(position.sampled) for position in positions],
        "top_logprobs": [table for _, table in tables],
        "text_offset": [position.offset for position in positions],
    }


def chat_logprobs(
    positions: Sequence[PositionLogprobs],
    tokenizer: Tokenizer,
    *,
    with_top: bool,
    by_id: bool = False,
) -> dict[str, Any]:
    """The object ``logprobs`` of a message. ``by_id``: tokens are named by their ids."""
    content = []
    for position in positions:
        likely = _with_sampled(position) if with_top else ()
        entries = [
            _entry(token, position, tokenizer, by_id=by_id) for token in (position.sampled, *likely)
        ]
        content.append({**entries[0], "top_logprobs": entries[1:]})
    return {"content": content, "refusal": None}


def _with_sampled(position: PositionLogprobs) -> tuple[TokenLogprob, ...]:
    """The likeliest tokens, and the sampled one where it is not among them."""
    sampled, top = position.sampled, position.top
    is_top = any(token.token_id == sampled.token_id for token in top)
    return top if is_top else (*top, sampled)


def _table(
    position: PositionLogprobs, tokenizer: Tokenizer, *, by_id: bool
) -> tuple[str, dict[str, float] | None]:
    """The name of the sampled token, and the likely tokens by name. The sampled token keeps its
    name; of several with the same text, only the first has it as its name and the rest are named by
    id, as in vLLM."""
    likely = _with_sampled(position)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for token in (position.sampled, *likely):
        if token.token_id not in names:
            raw = tokenizer.token_bytes(token.token_id, position.previous)
            name = _text(raw, undecodable="bytes:")
            names[token.token_id] = _id_name(token) if by_id or name in taken else name
            taken.add(names[token.token_id])
    name = names[position.sampled.token_id]
    if _or_null(position.sampled) is None:
        return name, None
    return name, {names[token.token_id]: _finite(token) for token in likely}


def prompt_table(
    position: PositionLogprobs, tokenizer: Tokenizer, *, rank: int, top: int
) -> dict[str, Any]:
    """An entry of vLLM's ``prompt_logprobs``: the prompt's token, which has this ``rank`` there,
    and the ``top`` likeliest, by id."""
    ranked = [(rank, position.sampled), *enumerate(position.top[:top], start=1)]
    return {
        str(token.token_id): {
            "logprob": _finite(token),
            "rank": place,
            "decoded_token": _text(tokenizer.token_bytes(token.token_id, position.previous)),
        }
        for place, token in ranked
    }


def _entry(
    token: TokenLogprob, position: PositionLogprobs, tokenizer: Tokenizer, *, by_id: bool
) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token.token_id, position.previous)
    return {
        "token": _id_name(token) if by_id else _text(raw),
        "logprob": _finite(token),
        "bytes": None if raw is None else list(raw),
    }


def _id_name(token: TokenLogprob) -> str:
    return f"token_id:{token.token_id}"


def _text(raw: bytes | None, *, undecodable: str = "") -> str:
    """The text of a token's bytes; ``undecodable`` and the bytes where they are not a text."""
    if raw is None:
        return ""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return undecodable + raw.decode("ascii", "backslashreplace")


def _or_null(token: TokenLogprob) -> float | None:
    return None if isnan(token.logprob) else _finite(token)


def _finite(token: TokenLogprob) -> float:
    return finite(token.logprob)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LOWEST_LOGPROB)
