"""What the clients of the soak know of the server's prefixes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from prefixd.store.artifact.artifact import pack_peft, pack_text
from tests.faults.faults_model import Content


def digest_of(content: Content, scratch: Path) -> str:
    """The digest that the store computes for an upload of ``content``."""
    body, target = content.body(), scratch / "packed"
    if content.kind == "text":
        return pack_text(body["json"]["text"], target).digest
    weights = scratch / "weights"
    weights.write_bytes(body["files"]["weights"][1])
    return pack_peft(body["files"]["config"][1], weights, target).digest


@dataclass
class PrefixState:
    """What is certain about one prefix name of one tenant. ``deletions`` counts started deletes."""

    present: bool = False
    deletions: int = 0
    versions: dict[int, Content] = field(default_factory=dict)
    alias: int | None = None
    alias_changes: int = 0

    def unchanged(self, changes: int | None = None) -> Callable[[], bool]:
        """A function that tells whether it certainly exists since this call; with the number of
        ``changes`` of its alias."""
        present, deletions = self.present, self.deletions
        return lambda: (
            present
            and self.deletions == deletions
            and (changes is None or self.alias_changes == changes)
        )

    def forget(self) -> None:
        """It may be deleted from now on."""
        self.deletions += 1
        self.alias_changes += 1
        self.present, self.alias = False, None
        self.versions.clear()


@dataclass
class KnownState:
    """The state of the server as its clients know it."""

    contents: list[Content]
    digests: dict[str, Content]
    states: dict[tuple[str, str], PrefixState] = field(default_factory=dict)

    def state(self, tenant: str, name: str) -> PrefixState:
        return self.states.setdefault((tenant, name), PrefixState())

    def soft_version(self, tenant: str, model: str) -> Content | None:
        """The soft prompt that a reference to a version names; None for any other model."""
        name, _, version = model.partition("@")
        versions = self.state(tenant, name).versions
        content = versions.get(int(version)) if version.isdigit() else None
        return content if content is not None and content.kind == "soft" else None
