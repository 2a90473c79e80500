"""Any history of publishes, aliases, deletes and restarts, against a plain dictionary."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import Engine
from store_artifacts import BASE

from prefix_store.artifact import read_artifact
from prefix_store.blobs import LocalBlobs
from prefix_store.database import create_tables, open_database
from prefix_store.errors import UnknownPrefix
from prefix_store.store import PrefixStore

TENANTS = st.sampled_from(["acme", "umbrella"])
NAMES = st.sampled_from(["a", "b"])
ALIASES = st.sampled_from(["prod", "next"])
TEXTS = st.sampled_from(["one", "two", "three"])


@dataclass
class Model:
    """What a name should hold."""

    texts: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    next_version: int = 1


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.models: dict[tuple[str, str], Model] = {}
        self.engine: Engine | None = None
        self.restart()

    @rule()
    def restart(self) -> None:
        if self.engine is not None:
            self.engine.dispose()
        home = Path(self.directory.name)
        self.engine = open_database(f"sqlite:///{home}/catalog.sqlite")
        create_tables(self.engine)
        self.store = PrefixStore(self.engine, LocalBlobs(home / "blobs"))

    @rule(tenant=TENANTS, name=NAMES, text=TEXTS)
    def publish(self, tenant: str, name: str, text: str) -> None:
        model = self.models.setdefault((tenant, name), Model())
        known = {held: version for version, held in model.texts.items()}
        published = self.store.publish_text(
            tenant=tenant, name=name, text=text, metadata=None, base=BASE, count_tokens=len
        )
        version = known.get(text, model.next_version)
        assert (published.manifest.version, published.created) == (version, text not in known)
        model.texts[version] = text
        model.next_version = max(model.next_version, version + 1)
        model.aliases["latest"] = version

    @rule(tenant=TENANTS, name=NAMES, alias=ALIASES, version=st.integers(0, 4))
    def set_alias(self, tenant: str, name: str, alias: str, version: int) -> None:
        model = self.models.get((tenant, name), Model())
        try:
            self.store.set_alias(tenant=tenant, name=name, alias=alias, version=version)
        except UnknownPrefix:
            assert version not in model.texts
        else:
            assert version in model.texts
            model.aliases[alias] = version

    @rule(tenant=TENANTS, name=NAMES, alias=ALIASES)
    def remove_alias(self, tenant: str, name: str, alias: str) -> None:
        model = self.models.get((tenant, name), Model())
        try:
            self.store.remove_alias(tenant=tenant, name=name, alias=alias)
        except UnknownPrefix:
            assert alias not in model.aliases
        else:
            del model.aliases[alias]

    @rule(tenant=TENANTS, name=NAMES)
    def delete(self, tenant: str, name: str) -> None:
        model = self.models.get((tenant, name), Model())
        try:
            removed = self.store.delete(tenant=tenant, name=name)
        except UnknownPrefix:
            removed = 0
        assert removed == len(model.texts)
        model.texts.clear()
        model.aliases.clear()

    @invariant()
    def every_reference_means_what_it_should(self) -> None:
        for (tenant, name), model in self.models.items():
            for alias, version in model.aliases.items():
                found = self.store.resolve(tenant=tenant, reference=f"{name}@{alias}")
                assert found.version == version
                assert alias in found.aliases
            manifests = self.store.versions(tenant=tenant, name=name) if model.texts else ()
            assert {m.version: self.text_of(tenant, m.digest) for m in manifests} == model.texts

    @invariant()
    def each_tenant_sees_its_own_names(self) -> None:
        for tenant in ("acme", "umbrella"):
            listed = [manifest.name for manifest in self.store.list(tenant=tenant).manifests]
            owned = sorted(
                n for (t, n), model in self.models.items() if t == tenant and model.texts
            )
            assert listed == owned

    def text_of(self, tenant: str, digest: str) -> str | None:
        path = self.store.fetch(tenant=tenant, digest=digest)
        return read_artifact(path, base=BASE, count_tokens=len).text

    def teardown(self) -> None:
        if hasattr(self, "engine") and self.engine is not None:
            self.engine.dispose()
            self.directory.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=12, stateful_step_count=20, deadline=None)
