"""Metadata that the owner of a prefix gives a version.

It is free, with a few known fields::

    {"labels": {"team": "search"}, "description": "…", "prompt_template": "Q: {prompt}\\nA:",
     "recipe": {"max_tokens": 8}, "base_fingerprint": "…", "task_id": 1, "anything": ["else"]}
"""

from collections.abc import Mapping
from typing import Any

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.recipe import RECIPE, TEMPLATE, folded, read_recipe
from prefixd.store.artifact.strict import StrictJsonError, canonical, parse_object
from prefixd.store.artifact.template import check_new_template
from prefixd.store.errors import ArtifactRefused, quoted

MAX_METADATA_BYTES = 16 * 1024
"""Without the template, which has a limit of its own."""

MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 128

METADATA_TEXTS = ("description", "prompt_template", "base_fingerprint")
"""Known fields of the metadata that hold a string."""


def encode_metadata(metadata: Mapping[str, Any] | None, *, base: BaseSpec) -> str:
    """Metadata for ``base`` as one line of JSON.

    Raises ArtifactRefused ``malformed_metadata``, ``malformed_recipe``, ``malformed_template``, or
    ``wrong_base`` when it names another base.
    """
    encoded = encode_fields(metadata or {})
    check_new_template(folded(metadata or {}).get(TEMPLATE))
    declared = (metadata or {}).get("base_fingerprint")
    if declared is not None and declared != base.fingerprint:
        raise ArtifactRefused(
            "wrong_base",
            f"expected a prefix for the base {base.name} with the fingerprint {base.fingerprint}, "
            f"and this one says it was made for {quoted(declared)}",
            param="metadata.base_fingerprint",
        )
    return encoded


def encode_fields(metadata: Mapping[str, Any]) -> str:
    """Metadata as one line of JSON; raises ArtifactRefused ``malformed_metadata`` or
    ``malformed_recipe``. An empty recipe is none."""
    try:
        fields = folded(metadata)
        if fields.get(RECIPE) == {}:
            del fields[RECIPE]
        raw = canonical(fields)
        size = len(canonical({name: fields[name] for name in fields.keys() - {TEMPLATE}}))
        if size > MAX_METADATA_BYTES:
            raise _malformed_metadata(
                f"expected metadata of at most {MAX_METADATA_BYTES} bytes as JSON, got {size}"
            )
        parse_object(raw)
    except (StrictJsonError, TypeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, StrictJsonError) else "it is not JSON"
        raise _malformed_metadata(f"expected metadata to be a JSON object: {reason}") from None
    if fields.get("labels") is not None:
        _check_labels(fields["labels"])
    for name in METADATA_TEXTS:
        if not isinstance(fields.get(name), str | None):
            raise _malformed_metadata(f"expected {name} to be a string", param=f"metadata.{name}")
    read_recipe(fields)
    return raw.decode("ascii")


def _check_labels(labels: object) -> None:
    if not isinstance(labels, dict) or len(labels) > MAX_LABELS:
        raise _malformed_metadata(
            f"expected labels to be an object of at most {MAX_LABELS} strings",
            param="metadata.labels",
        )
    for label, value in labels.items():
        if not isinstance(value, str) or max(len(label), len(value)) > MAX_LABEL_CHARACTERS:
            raise _malformed_metadata(
                f"expected the label {quoted(label)} to be a string of at most "
                f"{MAX_LABEL_CHARACTERS} characters",
                param="metadata.labels",
            )


def _malformed_metadata(message: str, *, param: str = "metadata") -> ArtifactRefused:
    return ArtifactRefused("malformed_metadata", message, param=param)
