"""The stored file of a version, read without the server's libraries.

docs/formats.md describes it: one line of JSON, then ``adapter_model.safetensors`` as it was
uploaded, or the UTF-8 text.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from prefixd.client.errors import ProtocolError
from prefixd.client.types import Prefix

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Artifact:
    """A stored file. ``config`` is the parsed ``adapter_config.json``, None for a text; ``payload``
    the safetensors or the text."""

    peft_type: str | None
    task_id: int | None
    config: dict[str, Any] | None
    payload: bytes


def read_artifact(data: bytes, prefix: Prefix) -> Artifact:
    """Read the stored file of ``prefix``. Raises ``ProtocolError`` for one with another digest, and
    for a format of a later server."""
    digest = sha256(data).hexdigest()
    if digest != prefix.digest:
        raise ProtocolError(
            f"expected the file of {prefix.reference} with the digest {prefix.digest}, the server "
            f"sent one with {digest}"
        )
    line, _, payload = data.partition(b"\n")
    try:
        fields = json.loads(line)
        if fields["format"] != FORMAT:
            raise ProtocolError(
                f"expected a stored file of format {FORMAT}, received format "
                f"{fields['format']!r:.20}: update prefixd"
            )
        return Artifact(fields["peft_type"], fields["task_id"], fields["config"], payload)
    except (ValueError, KeyError, TypeError):
        raise ProtocolError(f"the stored file of {prefix.reference} cannot be read") from None
