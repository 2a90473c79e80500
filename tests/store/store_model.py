"""What a store should hold, as plain dictionaries."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prefixd.server.errors import Conflict
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.errors import ArtifactRefused, BaseMismatch, UnknownPrefix, VersionInUse
from prefixd.store.names import LATEST
from tests.store.store_artifacts import BASE

OTHER = replace(BASE, name="other", fingerprint="e" * 64)

Selector = int | str
"""A version number, or the name of an alias."""

Meaning = int | type[Exception]
"""The version that a reference means, or the error it raises."""


@dataclass
class Name:
    """The expected state of a name: the text and the base's fingerprint of each version, and what
    refers to versions; ``latest`` is by fingerprint."""

    texts: dict[int, str] = field(default_factory=dict)
    fingerprints: dict[int, str] = field(default_factory=dict)
    latest: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    metadata: dict[int, dict[str, Any]] = field(default_factory=dict)  # flat: "labels.team"
    next_version: int = 1
    pin: int | None = None

    def meant(self) -> set[str]:
        """Texts that ``latest``, an alias or the pin refers to."""
        pins = () if self.pin is None else (self.pin,)
        numbers = {*self.latest.values(), *self.aliases.values(), *pins}
        return {self.texts[number] for number in numbers}

    def meaning(self, selector: Selector, base: BaseSpec) -> Meaning:
        """What the name with this selector means for a base."""
        if isinstance(selector, int) or selector.isdigit():
            return int(selector) if int(selector) in self.texts else UnknownPrefix
        if selector != LATEST:
            return self.aliases.get(selector, UnknownPrefix)
        if base.fingerprint in self.latest:
            return self.latest[base.fingerprint]
        return BaseMismatch if self.texts else UnknownPrefix

    def versions_of(self, base: BaseSpec) -> list[int]:
        """The versions of one base, newest first."""
        versions = [v for v, held in self.fingerprints.items() if held == base.fingerprint]
        return sorted(versions, reverse=True)

    def aliases_of(self, version: int) -> tuple[str, ...]:
        """All names that point at a version."""
        latest = [LATEST] if version in self.latest.values() else []
        return tuple(sorted([*latest, *(a for a, v in self.aliases.items() if v == version)]))

    def publish(self, text: str, base: BaseSpec) -> tuple[int, bool]:
        """Version of the text from now on, and whether it is a new one."""
        known = {self.texts[version]: version for version in self.versions_of(base)}
        version = known.get(text, self.next_version)
        self.texts[version] = text
        self.fingerprints[version] = base.fingerprint
        self.next_version = max(self.next_version, version + 1)
        self.latest[base.fingerprint] = version
        return version, text not in known

    def rollback(self, version: int, base: BaseSpec) -> Meaning:
        """What setting ``latest`` to a version leads to."""
        meaning = self.meaning(version, base)
        if isinstance(meaning, int) and self.fingerprints[version] != base.fingerprint:
            return BaseMismatch
        return meaning

    def obstacle(
        self, version: int, base: BaseSpec, bound: Iterable[str]
    ) -> type[Exception] | None:
        """Why a version cannot be deleted, given the selectors that users are bound to."""
        if version not in self.texts:
            return UnknownPrefix
        if version in {*self.aliases.values(), self.pin}:
            return VersionInUse
        own = self.fingerprints[version]
        only_of_base = [v for v, held in self.fingerprints.items() if held == own] == [version]
        ends_name = only_of_base and (own == base.fingerprint or len(self.texts) == 1)
        used = {str(version), *([LATEST] if ends_name else [])}
        return None if used.isdisjoint(bound) else Conflict

    def refusal(self, version: int, patch: Mapping[str, Any]) -> type[Exception] | None:
        """Why metadata cannot be changed."""
        if version not in self.texts:
            return UnknownPrefix
        other_base = patch.get("base_fingerprint") not in {None, self.fingerprints[version]}
        return ArtifactRefused if other_base or "task_id" in patch else None

    def patch(self, version: int, patch: Mapping[str, Any]) -> None:
        """With the patch merged into the metadata of a version."""
        fields = self.metadata.setdefault(version, {})
        for name, value in patch.items():
            if name == "labels" and value is None:
                for key in [key for key in fields if key.startswith("labels.")]:
                    del fields[key]
            elif name == "labels":
                fields.update({f"labels.{label}": text for label, text in value.items()})
            else:
                fields[name] = value

    def replace_metadata(self, version: int, metadata: Mapping[str, Any]) -> None:
        """With this metadata in place of the version's."""
        self.metadata.pop(version, None)
        self.patch(version, metadata)

    def described(self, version: int) -> tuple[dict[str, str], Any]:
        """Labels of a version, and the field ``note``."""
        fields = self.metadata.get(version, {})
        labels = {
            key.removeprefix("labels."): value
            for key, value in fields.items()
            if key.startswith("labels.") and value is not None
        }
        return labels, fields.get("note")

    def has_label(self, label: str, value: str, version: int | None) -> bool:
        """Whether there is this version and it has the label."""
        return version is not None and self.described(version)[0].get(label) == value

    def delete_version(self, version: int) -> None:
        """Without the version; ``latest`` of its base moves to the highest one left."""
        del self.texts[version]
        self.metadata.pop(version, None)
        own = self.fingerprints.pop(version)
        if self.latest[own] == version:
            remaining = [v for v, held in self.fingerprints.items() if held == own]
            del self.latest[own]
            if remaining:
                self.latest[own] = max(remaining)

    def delete(self) -> None:
        """Without any version."""
        for held in (self.texts, self.fingerprints, self.latest, self.aliases, self.metadata):
            held.clear()
        self.pin = None
