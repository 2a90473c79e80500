"""A data directory and the store on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from prefixd.store.blobs.blobs import Blobs
from prefixd.store.names import BlobKey
from prefixd.store.store import PrefixStore, Published
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE, config_bytes, ramp, soft, spool


@dataclass
class Clock:
    """The time, set forward by hand."""

    ahead: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@dataclass(frozen=True, slots=True)
class Home:
    """A data directory and the store on it."""

    path: Path
    store: PrefixStore
    blobs: Blobs
    database: Engine
    clock: Clock
    damage: Callable[[str, bytes], None]
    """Writes these bytes over the blob at a place, behind the driver's back."""

    def put(
        self, name: str = "style", *, tenant: str = "acme", seed: float = 0.0, **options: Any
    ) -> Published:
        """Publish a prompt-tuning adapter whose bytes depend on ``seed``."""
        weights = spool(self.path, soft(ramp(4, 16) + seed))
        return changes.publish_peft(
            self.store,
            tenant=tenant,
            name=name,
            config=config_bytes(),
            weights=weights,
            base=BASE,
            **{"metadata": {"seed": seed}, **options},
        )

    def put_text(self, text: str, name: str = "style", *, tenant: str = "acme") -> Published:
        """Publish a hard prompt."""
        return changes.publish_text(
            self.store,
            tenant=tenant,
            name=name,
            text=text,
            metadata=None,
            base=BASE,
            count_tokens=len,
        )

    def held(self) -> set[BlobKey]:
        """The blobs that are there."""
        return {key for key, _ in self.blobs.walk()}
