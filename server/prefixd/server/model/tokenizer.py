"""Text to tokens and back."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Tokenizer:
    """A Hugging Face tokenizer behind the few calls the server makes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written out in it count as such."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids``, special tokens skipped, white space as it is."""
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
        """A chat as the model's template writes it; ValueError when the model has none or the
        template refuses these messages."""
        if not self._tokenizer.chat_template:
            raise ValueError(
                "this model has no chat template; use /v1/completions with a plain prompt"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # Jinja raises what the template's author wrote
            raise ValueError(f"the model's chat template refused the messages: {error}") from error
        return text

    def detokenizer(self) -> "StreamDetokenizer":
        """A fresh incremental detokenizer for one sequence."""
        return StreamDetokenizer(self)

    @property
    def backend(self) -> Any:
        """The fast tokenizer underneath."""
        return self._tokenizer.backend_tokenizer


class StreamDetokenizer:
    """Token ids to text as they come; a character goes out when it is whole.

    ``DecodeStream`` keeps back an unfinished character and has no flush, so at the end the whole is
    decoded once more and what is missing goes out (FACTS section 7). And it raises where a
    tokenizer with byte fallback takes back text that is out already: a run of bytes that is no
    UTF-8 decodes to replacement characters throughout, its good beginning too. What was held back
    then goes out by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._held: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """Text that became final with this token."""
        self._token_ids.append(token_id)
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id) or ""
        except Exception:  # noqa: BLE001 - tokenizers has no class of its own for it
            text = self._tokenizer.decode(self._held)
            self._stream = DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer.backend, token_id)
        if text:
            self._held.clear()
        self._sent += text
        return text

    def flush(self) -> str:
        """What is still held back, broken characters as replacement characters."""
        whole = self._tokenizer.decode(self._token_ids)
        if whole.startswith(self._sent):
            text = whole[len(self._sent) :]
        else:
            text = self._tokenizer.decode(self._held)
        self._held.clear()
        self._sent += text
        return text
