"""Text to tokens and back."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Tokenizer:
    """The calls of a Hugging Face tokenizer that the server needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it count as such."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, without special tokens, whitespace unchanged."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, special or not."""
        text: str = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return text

    def render_chat(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
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
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template may raise any exception
            raise ValueError(f"the model's chat template rejected the messages: {error}") from error
        return text

    def detokenizer(self) -> "StreamDetokenizer":
        """A new incremental detokenizer for one sequence."""
        return StreamDetokenizer(self)

    @property
    def backend(self) -> Any:
        """The fast tokenizer of the ``tokenizers`` package."""
        return self._tokenizer.backend_tokenizer


class StreamDetokenizer:
    """Decodes token ids incrementally; returns a character only when it is complete.

    ``DecodeStream`` buffers an incomplete character and has no flush, so ``flush`` decodes all
    tokens and returns the missing rest. ``DecodeStream`` also raises when a tokenizer with byte
    fallback changes text it has already returned: a run of bytes that is not valid UTF-8 decodes
    to replacement characters only, including its valid beginning. The buffered tokens are then
    decoded by themselves.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._pending: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """Text that became final with this token."""
        self._token_ids.append(token_id)
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id) or ""
        except Exception:  # noqa: BLE001 - tokenizers raises a plain Exception
            text = self._tokenizer.decode(self._pending)
            self._stream = DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer.backend, token_id)
        if text:
            self._pending.clear()
        self._sent += text
        return text

    def flush(self) -> str:
        """The buffered rest, incomplete characters as replacement characters."""
        full_text = self._tokenizer.decode(self._token_ids)
        if full_text.startswith(self._sent):
            text = full_text[len(self._sent) :]
        else:
            text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        self._sent += text
        return text
