"""What an upload says of itself beside its tensors: free metadata with a few known fields.

::

    {"labels": {"team": "search"}, "description": "…", "prompt_template": "Q: {prompt}\\nA:",
     "base_fingerprint": "…", "task_id": 1, "anything": ["else"]}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefixd.store.artifact.base import BaseSpec
from prefixd.store.artifact.strict_json import StrictJsonError, canonical, parse_object
from prefixd.store.errors import ArtifactRefused, quoted

MAX_METADATA_BYTES = 16 * 1024
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 128

_TEXTS = ("description", "prompt_template", "base_fingerprint")


@dataclass(frozen=True, slots=True)
class Details:
    """Metadata taken apart: the fields a manifest names, and the free rest."""

    labels: Mapping[str, str]
    description: str | None
    prompt_template: str | None
    free: Mapping[str, Any]


def encode_metadata(metadata: Mapping[str, Any] | None, *, base: BaseSpec) -> str:
    """Metadata for ``base`` as one line of JSON.

    Raises ArtifactRefused ``malformed_metadata``, or ``wrong_base`` when it names another base.
    """
    try:
        fields = dict(metadata or {})
        raw = canonical(fields)
        if len(raw) > MAX_METADATA_BYTES:
            raise _malformed(
                f"expected metadata of at most {MAX_METADATA_BYTES} bytes as JSON, got {len(raw)}"
            )
        parse_object(raw)
    except (StrictJsonError, TypeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, StrictJsonError) else "it is not JSON"
        raise _malformed(f"expected metadata to be a JSON object: {reason}") from None
    _check_labels(fields.get("labels"))
    for name in _TEXTS:
        if not isinstance(fields.get(name), str | None):
            raise _malformed(f"expected {name} to be a string", param=f"metadata.{name}")
    _check_base(fields.get("base_fingerprint"), base)
    return raw.decode("ascii")


def decode_metadata(raw: str) -> Details:
    """Stored metadata, taken apart. What was stored before a field was known stays in the rest."""
    free = json.loads(raw)
    labels = free.pop("labels") if _are_labels(free.get("labels")) else {}
    texts = {name: free.pop(name) if isinstance(free.get(name), str) else None for name in _TEXTS}
    return Details(
        labels=labels,
        description=texts["description"],
        prompt_template=texts["prompt_template"],
        free=free,
    )


def _are_labels(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _check_labels(labels: object) -> None:
    if labels is None:
        return
    if not isinstance(labels, dict) or len(labels) > MAX_LABELS:
        raise _malformed(
            f"expected labels to be an object of at most {MAX_LABELS} strings",
            param="metadata.labels",
        )
    for label, value in labels.items():
        if not isinstance(value, str) or max(len(label), len(value)) > MAX_LABEL_CHARACTERS:
            raise _malformed(
                f"expected the label {quoted(label)} to be a string of at most "
                f"{MAX_LABEL_CHARACTERS} characters",
                param="metadata.labels",
            )


def _check_base(declared: str | None, base: BaseSpec) -> None:
    if declared is not None and declared != base.fingerprint:
        raise ArtifactRefused(
            "wrong_base",
            f"expected a prefix for the base {base.name} with the fingerprint {base.fingerprint}, "
            f"and this one says it was made for {quoted(declared)}",
            param="metadata.base_fingerprint",
        )


def _malformed(message: str, *, param: str = "metadata") -> ArtifactRefused:
    return ArtifactRefused("malformed_metadata", message, param=param)
