"""Embeddings that a request sends in place of the tokens of a prompt.

KV reuse names them by the digest of their bytes, so equal bytes share KV, within a tenant and
prefix as all KV does.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from prefixd.server.api.served import ServedModel
from prefixd.server.engine.inputs import Embeddings
from prefixd.server.errors import BadRequest
from prefixd.store.artifact.embeddings import read_embeddings
from prefixd.store.artifact.weights import Floats
from prefixd.store.errors import ArtifactRefused

GiveEmbeddings = Callable[[Floats, bytes], Embeddings]
"""Rows [n, width] under a name, as the runner takes them."""


@dataclass(frozen=True, slots=True)
class Given:
    """Embeddings in a prompt, which no version holds."""

    payload: Embeddings


@dataclass(frozen=True, slots=True)
class EmbedsReader:
    """Reads the field ``prompt_embeds`` for the served model."""

    served: ServedModel
    give: GiveEmbeddings

    def read(self, texts: list[str]) -> list[Given]:
        """Each of ``texts``, safetensors in base64, as embeddings. Raises BadRequest."""
        if texts and self.served.encoder is not None:
            raise _invalid("expected a prompt, since this base is an encoder-decoder", None)
        if len(texts) == 1:
            return [self._read(texts[0], None)]
        return [self._read(text, index) for index, text in enumerate(texts)]

    def _read(self, text: str, index: int | None) -> Given:
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            received = f"a string of {len(text)} characters that is not"
            raise _invalid(f"expected safetensors in base64; received {received}", index) from None
        try:
            rows = read_embeddings(raw, self.served.base, max_rows=self.served.max_positions)
        except ArtifactRefused as error:
            raise _invalid(error.message, index) from None
        return Given(self.give(rows, b"embeds:" + hashlib.sha256(raw).digest()))


def _invalid(message: str, index: int | None) -> BadRequest:
    param = "prompt_embeds" if index is None else f"prompt_embeds[{index}]"
    return BadRequest(f"'{param}': {message}", code="invalid_prompt_embeds", param=param)
