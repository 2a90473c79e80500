"""Texts with the role ``system``: the system turn of each chat under them.

The tokens of a chat are those of the whole conversation. Where they begin with the tokens that were
compiled for the version, those are shared, and only the others are the prompt; otherwise all are.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

from prefixd.server.api.generate.messages import ChatMessage, PrefixPart, SystemTurn
from prefixd.server.api.generate.prompts import PromptTokens
from prefixd.server.api.served import ServedModel
from prefixd.server.errors import BadRequest
from prefixd.store.artifact.artifact import read_text
from prefixd.store.names import BlobKey
from prefixd.store.store import Manifest, PrefixStore

SEPARATOR = "\n\n"
"""Between the text of a version and the system message of a request."""

_KEPT_CHARACTERS = 16 * 1024 * 1024


class SystemText(NamedTuple):
    """A text, and the token ids that its version keeps in the KV pool."""

    text: str
    tokens: tuple[int, ...]


@dataclass(slots=True)
class SystemTexts:
    """The texts of versions, read from the store; those used last are kept. Methods may be called
    from any thread."""

    served: ServedModel
    store: PrefixStore
    _texts: "OrderedDict[BlobKey, SystemText]" = field(default_factory=OrderedDict)
    _num_characters: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, manifest: Manifest) -> SystemText:
        """The text of a version with the role system. Blocking. Raises as the store does,
        ValueError."""
        key = BlobKey(manifest.tenant, manifest.digest)
        with self._lock:
            known = self._texts.get(key)
            if known is not None:
                self._texts.move_to_end(key)
                return known
        text = read_text(self.store.fetch(tenant=key.tenant, digest=key.digest))
        known = SystemText(text, tuple(self.served.tokenizer.encode_system(text)))
        with self._lock:
            if key not in self._texts:
                self._texts[key] = known
                self._num_characters += len(text)
            while self._num_characters > _KEPT_CHARACTERS:
                _, oldest = self._texts.popitem(last=False)
                self._num_characters -= len(oldest.text)
        return known


def with_system(messages: list[ChatMessage], text: str) -> list[ChatMessage]:
    """The messages under a system turn of ``text``, which one of their own continues. Raises
    BadRequest."""
    first, *others = messages
    if not isinstance(first, SystemTurn):
        return [SystemTurn(role="system", content=text), *messages]
    own = first.content if isinstance(first.content, str) else _joined(first)
    return [first.model_copy(update={"content": text + SEPARATOR + own}), *others]


def _joined(turn: SystemTurn) -> str:
    texts = [part.text for part in turn.content if not isinstance(part, PrefixPart | str)]
    if len(texts) != len(turn.content):
        raise BadRequest(
            "content parts of type prefix: expected none under a text; received some",
            code="misplaced_prefix",
            param="messages",
        )
    return "\n".join(texts)


def split(prompt: PromptTokens, head: tuple[int, ...]) -> PromptTokens | None:
    """The prompt without ``head``, with which it begins; None: it does not, or has nothing else."""
    size, token_ids = len(head), prompt.token_ids
    if not size or len(token_ids) == size or token_ids[:size] != head:
        return None
    return PromptTokens(token_ids[size:])
