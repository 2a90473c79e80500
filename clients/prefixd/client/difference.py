"""How two versions differ: their fields, their tensors or their texts. No I/O."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import unified_diff

from prefixd.client.artifacts import Artifact
from prefixd.client.tensors import greatest_difference, read_tensors
from prefixd.client.types import Prefix, composition_of

COMPARED = (
    "digest",
    "kind",
    "peft_type",
    "role",
    "num_virtual_tokens",
    "dtype",
    "fingerprint",
    "description",
    "prompt_template",
)
"""Fields of a manifest that are compared as they are; ``labels``, ``recipe`` and ``metadata`` are
by key."""

_NO_NEWLINE = "\\ No newline at end of file\n"


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor of both versions; the shape and dtype of a side without it is None.

    ``greatest`` is the greatest absolute difference of two values, None for unequal shapes.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    greatest: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two versions.

    ``fields`` has the values by name on each side that has the field, as ``left`` and ``right``.
    ``tensors`` has every tensor of two PEFT prefixes with unequal digests, ``text`` the lines of a
    unified diff of two texts, each with its line end.
    """

    left: str
    right: str
    fields: Mapping[str, Mapping[str, object]]
    tensors: tuple[TensorDifference, ...] = ()
    text: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether nothing differs: the digests too are equal."""
        return not self.fields


def compare(
    left: Prefix, right: Prefix, contents: tuple[Artifact, Artifact] | None = None
) -> Difference:
    """How two versions differ. ``contents`` are their stored files; without them, which is for
    versions with one digest, only the manifests are compared."""
    sides = (_fields(left), _fields(right))
    if left.fingerprint != right.fingerprint:  # one base may have been renamed
        sides[0]["base"], sides[1]["base"] = left.base, right.base
    if contents is None:
        return Difference(left.reference, right.reference, _differing(*sides))
    ours, theirs = contents
    for fields, artifact in zip(sides, contents, strict=True):
        fields.update({f"config.{key}": value for key, value in (artifact.config or {}).items()})
    differing = _differing(*sides)
    names = (left.reference, right.reference)
    if ours.config is not None and theirs.config is not None:
        return Difference(*names, differing, tensors=_tensors(ours.payload, theirs.payload))
    if not left.members and not right.members and ours.config is None and theirs.config is None:
        return Difference(*names, differing, text=_text(ours.payload, theirs.payload, names))
    return Difference(*names, differing)


def _fields(prefix: Prefix) -> dict[str, object]:
    fields: dict[str, object] = {name: getattr(prefix, name) for name in COMPARED}
    if prefix.members:
        fields["composition"] = composition_of(prefix)
    fields.update({f"labels.{key}": value for key, value in prefix.labels.items()})
    recipe = prefix.recipe.model_dump(
        mode="json", exclude_defaults=True, exclude={"prompt_template", "takes"}
    )
    fields.update({f"recipe.{key}": value for key, value in recipe.items()})
    fields.update({f"metadata.{key}": value for key, value in prefix.metadata.items()})
    return fields


def _differing(
    left: Mapping[str, object], right: Mapping[str, object]
) -> dict[str, dict[str, object]]:
    differing = {}
    for name in dict.fromkeys([*left, *right]):
        values = {
            side: fields[name]
            for side, fields in (("left", left), ("right", right))
            if name in fields
        }
        # As JSON: to Python, true equals 1 and -0.0 equals 0.
        encoded = {json.dumps(value, sort_keys=True) for value in values.values()}
        if len(values) == 1 or len(encoded) == 2:
            differing[name] = values
    return differing


def _tensors(left: bytes, right: bytes) -> tuple[TensorDifference, ...]:
    ours, theirs = read_tensors(left), read_tensors(right)
    differences = []
    for name in sorted({*ours, *theirs}):
        sides = (ours.get(name), theirs.get(name))
        shapes = tuple(None if side is None else side.shape for side in sides)
        dtypes = tuple(None if side is None else side.dtype for side in sides)
        greatest = None
        if sides[0] is not None and sides[1] is not None and shapes[0] == shapes[1]:
            greatest = greatest_difference(sides[0], sides[1])
        differences.append(
            TensorDifference(name, (shapes[0], shapes[1]), (dtypes[0], dtypes[1]), greatest)
        )
    return tuple(differences)


def _text(left: bytes, right: bytes, names: tuple[str, str]) -> tuple[str, ...]:
    lines = unified_diff(_lines(left), _lines(right), *names)
    return tuple(line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}" for line in lines)


def _lines(text: bytes) -> list[str]:
    """Lines that end in a line feed alone: a carriage return belongs to its line."""
    *lines, last = text.decode("utf-8").split("\n")
    return [f"{line}\n" for line in lines] + ([last] if last else [])
