"""A data directory and the store on it."""

from dataclasses import dataclass
from pathlib import Path

from store_artifacts import BASE, config_bytes, ramp, soft, spool

from prefix_store.store import PrefixStore, Published


@dataclass(frozen=True, slots=True)
class Home:
    """A data directory and the store on it."""

    path: Path
    store: PrefixStore

    def put(self, name: str = "style", *, tenant: str = "acme", seed: float = 0.0) -> Published:
        """Publish a prompt-tuning adapter whose bytes depend on ``seed``."""
        weights = spool(self.path, soft(ramp(4, 16) + seed))
        return self.store.publish_peft(
            tenant=tenant,
            name=name,
            config=config_bytes(),
            weights=weights,
            metadata={"seed": seed},
            base=BASE,
        )
