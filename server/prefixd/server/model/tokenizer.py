"""Text to tokens and back."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from prefixd.server.engine.detokenizer import Detokenizer
from prefixd.server.model.detokenizer import new_detokenizer
from prefixd.server.model.system_turn import common_tokens
from prefixd.server.model.token_table import TokenTable

_PROBE = "a 1"
_MAX_LEADING_TOKENS = 16


class Tokenizer:
    """The calls of a Hugging Face tokenizer that the server needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._opening, self.closing = _tokens_around(tokenizer)
        self._table = TokenTable(tokenizer.backend_tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it count as such.

        ``add_special_tokens`` adds the tokenizer's opening tokens (BOS). Those of ``closing`` (EOS,
        SEP) are never added: a prompt of a decoder goes on.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return [*self._opening, *ids] if add_special_tokens else ids

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of special tokens by name, as chat templates use them."""
        tokens = self._tokenizer.special_tokens_map.items()
        return {name: str(token) for name, token in tokens if not isinstance(token, list)}

    def encode_prefix(self, text: str) -> list[int]:
        """Token ids of a text prefix: the opening tokens once, also when the text has them."""
        ids = self.encode(text, add_special_tokens=False)
        return ids if self._opening_at(ids) is not None else [*self._opening, *ids]

    def encode_system(self, text: str) -> list[int]:
        """Token ids that all conversations have in common whose system turn begins with ``text``.
        Raises ValueError as ``render_chat``, and for a template without such a turn."""
        encode = partial(self.encode, add_special_tokens=False)
        template = self._tokenizer.chat_template
        return common_tokens(text, template=template, render=self.render_chat, encode=encode)

    def without_opening(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` without the opening tokens that they begin with, if they do.

        Whitespace may come before them, as some chat templates write it.
        """
        at = self._opening_at(token_ids)
        if at is None:
            return token_ids
        return token_ids[:at] + token_ids[at + len(self._opening) :]

    def _opening_at(self, token_ids: list[int]) -> int | None:
        size = len(self._opening)
        if not size:
            return None
        for at in range(min(len(token_ids) - size, _MAX_LEADING_TOKENS) + 1):
            if token_ids[at : at + size] == self._opening:
                return at if not self._tokenizer.decode(token_ids[:at]).strip() else None
        return None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, without special tokens, whitespace unchanged."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def written(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, with special tokens, whitespace unchanged."""
        text: str = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        return text

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """The entries of the vocabulary; an id without one is empty."""
        entries = self._tokenizer.convert_ids_to_tokens(list(token_ids))
        return [entry or "" for entry in entries]

    def token_bytes(self, token_id: int, previous: int | None) -> bytes | None:
        """The bytes of a token after ``previous``, the token with text before it (None: the first
        of a text); those of its name for a special token. None for an id without a token."""
        return self._table.raw(token_id, previous)

    def spellings(self, text: str) -> Sequence[str]:
        """``text``, and what its tokens decode to with special tokens written out.

        They differ where a tokenizer puts a space before the first word after a special token.
        """
        token_ids = self.encode(text, add_special_tokens=False)
        if not any(map(self._table.special, token_ids)):
            return (text,)
        written: str = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        return (text,) if written == text else (text, written)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that the model's chat template renders.

        Raises ValueError when the model has no template or the template rejects the messages.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(
                "this model has no chat template; use /v1/completions with a plain prompt"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(template_kwargs or {}),
            )
        except Exception as error:  # a template may raise any exception
            raise ValueError(f"the model's chat template rejected the messages: {error}") from error
        return text

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A new incremental detokenizer for one sequence, which continues ``prompt``."""
        return new_detokenizer(self._table, prompt)

    @property
    def backend(self) -> Any:
        """The fast tokenizer of the ``tokenizers`` package."""
        return self._tokenizer.backend_tokenizer


def _tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer's post-processor adds before a text, and after it."""
    encoded = tokenizer(_PROBE)
    ids: list[int] = encoded["input_ids"]
    sequence_ids = encoded.sequence_ids(0)  # None for an added token
    inner = [place for place, sequence in enumerate(sequence_ids) if sequence is not None]
    return (ids[: inner[0]], ids[inner[-1] + 1 :]) if inner else ([], [])
