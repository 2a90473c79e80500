"""Any history of publishes, aliases, bindings, deletes, collections, restarts and crashes, on both
stacks, against plain dictionaries."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine

from prefixd.server.errors import NotFound
from prefixd.server.tenants.bindings import Bindings, ChosenBy
from prefixd.server.tenants.principal import COMMAND_LINE
from prefixd.server.tenants.references import check_unbound
from prefixd.server.tenants.registry import Tenants
from prefixd.store.artifact.artifact import pack_text, read_artifact
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.blobs.blobs import open_blobs
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.db.database import metadata, open_database, writing
from prefixd.store.db.migrate import upgrade
from prefixd.store.errors import BaseMismatch, UnknownPrefix
from prefixd.store.names import BlobKey
from prefixd.store.store import Change, Manifest, PrefixStore
from tests.real_services import S3_TIMEOUT_S
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_model import OTHER, Meaning, Name, Selector

TENANTS = ("acme", "umbrella")
GRACE = timedelta(days=1)
START = datetime(2026, 1, 1, tzinfo=UTC)

tenants = st.sampled_from(TENANTS)
names = st.sampled_from(["a", "b"])
aliases = st.sampled_from(["prod", "next"])
texts = st.sampled_from(["one", "two", "three"])
users = st.sampled_from(["alice", "bob"])
references = st.sampled_from(["a", "b", "a@latest", "a@prod", "b@1", "a@2"])
versions = st.integers(0, 4)
bases = st.sampled_from([BASE, OTHER])
selectors = st.one_of(versions, st.sampled_from(["latest", "prod"]))
patches = st.sampled_from(
    [
        {"labels": {"team": "care"}},
        {"labels": {"team": None, "area": "eu"}},
        {"labels": None, "note": 1},
        {"note": None},
        {"base_fingerprint": BASE.fingerprint},
        {"task_id": 1},
    ]
)
uploaded = st.sampled_from([None, None, {"labels": {"team": "care"}}, {"note": 2}])

Stack = Callable[[], tuple[str, str | None]]
"""Gives database URL and blobs URL; None for blobs means files next to the database."""


class Crash(Exception):
    """The process is killed here."""


End = type[Crash] | None
ends = st.sampled_from([None, None, Crash])
"""How a transaction ends: with a commit, or with a crash before it."""


@contextmanager
def expected(outcome: Meaning | None) -> Iterator[None]:
    """The block raises ``outcome`` if that is an error, and none otherwise."""
    with pytest.raises(outcome) if isinstance(outcome, type) else nullcontext():
        yield


class StoreMachine(RuleBasedStateMachine):
    stack: Stack
    engine: Engine | None = None

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.home = Path(self.directory.name)
        self.now = START
        self.names: dict[tuple[str, str], Name] = {}
        self.bound: dict[tuple[str, str], str] = {}
        self.idle: dict[BlobKey, datetime] = {}  # wanted then, and by no version now
        self.digests: dict[str, str] = {}
        self.told: list[Change] = []
        self.meant: set[BlobKey] = set()
        self.shown: dict[tuple[str, str], tuple[int, tuple[Manifest, ...]]] = {}
        self.bound_at: dict[str, int] = {}  # the highest revision of a tenant's bindings
        self.urls = self.stack()
        self.restart()
        assert self.engine is not None
        with writing(self.engine) as connection:
            for table in reversed(metadata.sorted_tables):
                connection.execute(table.delete())
        for tenant in TENANTS:
            Tenants(self.engine).create_tenant(tenant)

    @rule()
    def restart(self) -> None:
        if self.engine is not None:
            self.engine.dispose()
        database_url, blobs_url = self.urls
        self.engine = open_database(database_url.replace("HOME", str(self.home)))
        upgrade(self.engine)
        self.blobs = open_blobs(blobs_url, self.home, timeout_s=S3_TIMEOUT_S)
        self.store = PrefixStore(self.engine, self.blobs, clock=lambda: self.now)
        self.store.watch(self.told.append)
        self.bindings = Bindings(self.engine)

    @rule(tenant=tenants, name=names, text=texts, base=bases, metadata=uploaded)
    def publish(
        self,
        tenant: str,
        name: str,
        text: str,
        base: BaseSpec,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        model = self.name(tenant, name)
        version, created = model.publish(text, base)
        if metadata is not None:
            model.replace_metadata(version, metadata)
        self.idle.pop(self.key(tenant, text), None)
        before, _ = self.shown.get((tenant, name), (0, ()))
        published = self.put(tenant, name, text, base=base, metadata=metadata)
        assert (published.manifest.version, published.created) == (version, created)
        assert published.manifest.prefix_revision > before

    @rule(owner=tenants, source=references, tenant=tenants, name=names, base=bases)
    def publish_the_content_of_a_version(
        self, owner: str, source: str, tenant: str, name: str, base: BaseSpec
    ) -> None:
        """The stored file of any version, published by any tenant: the digest stays."""
        try:
            manifest = self.store.resolve(tenant=owner, reference=source, base=base)
        except (BaseMismatch, UnknownPrefix):
            return
        content = self.home / "content"
        content.write_bytes(self.store.fetch(tenant=owner, digest=manifest.digest).read_bytes())
        text = self.text_of(owner, manifest.digest)
        assert text is not None
        version, created = self.name(tenant, name).publish(text, base)
        self.idle.pop(self.key(tenant, text), None)
        options: dict[str, Any] = {"tenant": tenant, "name": name, "metadata": None, "base": base}
        published = changes.publish_artifact(
            self.store, artifact=content, count_tokens=len, **options
        )
        again = published.manifest
        assert (again.version, published.created) == (version, created)
        assert (again.digest, again.size_bytes) == (manifest.digest, manifest.size_bytes)

    @rule(tenant=tenants, name=names, text=texts, base=bases, again=st.booleans())
    def publish_overtaken(
        self, tenant: str, name: str, text: str, base: BaseSpec, again: bool
    ) -> None:
        """A publish takes longer than the grace, and a collection and another publish of the same
        bytes, killed before it wrote them, come between its blob and its row."""
        key = self.key(tenant, text)
        known = key in self.referenced()
        change = self.store.change

        def late(tenant: str) -> Any:
            patch.undo()
            if not known:
                self.idle[key] = self.now
            self.now += 2 * GRACE
            self.collect(tenant, [], adopt=False)
            if again:
                self.store._rows.want(key, size_bytes=1, now=self.now)
            return change(tenant)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.store, "change", late)
            self.publish(tenant, name, text, base)

    @rule(
        tenant=tenants,
        name=names,
        text=texts,
        base=bases,
        stage=st.sampled_from(["staged", "wanted", "written", "uncommitted", "committed"]),
    )
    def crash_in_publish(
        self, tenant: str, name: str, text: str, base: BaseSpec, stage: str
    ) -> None:
        """Before the commit nothing has happened; after it the version is there, acknowledged or
        not."""
        with self.crash_when(stage) as options, pytest.raises(Crash):
            self.put(tenant, name, text, base=base, **options)
        leftover = self.blobs.staging().__enter__()
        leftover.write_bytes(b"half of a prefix")
        key = self.key(tenant, text)
        if stage == "committed":
            self.name(tenant, name).publish(text, base)
            self.idle.pop(key, None)
        elif stage != "staged" and key not in self.referenced():
            self.idle[key] = self.now
        self.restart()

    @rule(tenant=tenants, name=names, alias=aliases, selector=selectors, base=bases)
    def set_alias(
        self, tenant: str, name: str, alias: str, selector: Selector, base: BaseSpec
    ) -> None:
        model = self.name(tenant, name)
        meaning = model.meaning(selector, base)
        with expected(meaning), self.store.change(tenant) as tx:
            target = tx.set_alias(name, alias, version=selector, base=base)
            assert target.version == meaning
        if isinstance(meaning, int):
            model.aliases[alias] = meaning

    @rule(choice=st.integers(0, 100), base=bases, end=ends)
    def rollback(self, choice: int, base: BaseSpec, end: End) -> None:
        tenant, name, version = self.a_version(choice)
        model = self.name(tenant, name)
        outcome = model.rollback(version, base)
        failure = outcome if isinstance(outcome, type) else end
        for _ in range(2):  # the second time nothing changes
            with expected(failure), self.store.change(tenant) as tx:
                target = tx.set_alias(name, "latest", version=version, base=base)
                assert target.version == version
                if end:
                    raise end
            if failure is None:
                model.latest[base.fingerprint] = version

    @rule(choice=st.integers(0, 100), base=bases, end=ends)
    def delete_version(self, choice: int, base: BaseSpec, end: End) -> None:
        tenant, name, version = self.a_version(choice)
        model = self.name(tenant, name)
        bound = [
            selector or "latest"
            for (owner, _), reference in self.bound.items()
            for bound_name, _, selector in [reference.partition("@")]
            if (owner, bound_name) == (tenant, name)
        ]
        outcome = model.obstacle(version, base, bound)
        before = self.referenced()
        with expected(outcome or end), self.store.change(tenant) as tx:
            check_unbound(tx.connection, tx.delete_version(name, version, base=base))
            if end:
                raise end
        if outcome is None and end is None:
            model.delete_version(version)
            self.idle |= dict.fromkeys(before - self.referenced(), self.now)

    @rule(choice=st.integers(0, 100), patch=patches, base=bases, end=ends)
    def patch_metadata(self, choice: int, patch: dict[str, Any], base: BaseSpec, end: End) -> None:
        tenant, name, version = self.a_version(choice)
        model = self.name(tenant, name)
        outcome = model.refusal(version, patch)
        with expected(outcome or end), self.store.change(tenant) as tx:
            changed = tx.merge_metadata(name, version, patch, base=base)
            assert changed.version == version
            if end:
                raise end
        if outcome is None and end is None:
            model.patch(version, patch)

    @rule(tenant=tenants, name=names, alias=aliases)
    def remove_alias(self, tenant: str, name: str, alias: str) -> None:
        model = self.name(tenant, name)
        try:
            changes.remove_alias(self.store, tenant=tenant, name=name, alias=alias)
        except UnknownPrefix:
            assert alias not in model.aliases
        else:
            del model.aliases[alias]

    @rule(tenant=tenants, reference=references, base=bases)
    def pin(self, tenant: str, reference: str, base: BaseSpec) -> None:
        name, _, selector = reference.partition("@")
        model = self.name(tenant, name)
        meaning = model.meaning(selector or "latest", base)
        with expected(meaning):
            pinned = changes.set_pin(self.store, tenant=tenant, reference=reference, base=base)
            assert (pinned.version, pinned.pinned) == (meaning, True)
        if isinstance(meaning, int):
            model.pin = meaning

    @rule(tenant=tenants, name=names)
    def unpin(self, tenant: str, name: str) -> None:
        model = self.name(tenant, name)
        try:
            changes.remove_pin(self.store, tenant=tenant, name=name)
        except UnknownPrefix:
            assert model.pin is None
        model.pin = None

    @rule(tenant=tenants, user=users, reference=references)
    def bind(self, tenant: str, user: str, reference: str) -> None:
        self.bindings.bind_many(tenant, [(user, reference)])
        self.bound[tenant, user] = reference
        revision = self.bindings.get(tenant, user).revision
        assert revision > self.bound_at.get(tenant, 0)
        self.bound_at[tenant] = revision

    @rule(tenant=tenants, user=users)
    def unbind(self, tenant: str, user: str) -> None:
        with expected(None if (tenant, user) in self.bound else NotFound):
            self.bindings.unbind(tenant, user, actor=COMMAND_LINE)
        self.bound.pop((tenant, user), None)

    @rule(tenant=tenants, name=names)
    def delete(self, tenant: str, name: str) -> None:
        model = self.name(tenant, name)
        before = self.referenced()
        try:
            removed = changes.delete(self.store, tenant=tenant, name=name)
        except UnknownPrefix:
            removed = 0
        assert removed == len(model.texts)
        model.delete()
        self.idle |= dict.fromkeys(before - self.referenced(), self.now)

    @rule(hours=st.sampled_from([1, 12, 24, 25]))
    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    @rule(tenant=tenants, resident=st.lists(texts, max_size=2), adopt=st.booleans())
    def collect(self, tenant: str, resident: list[str], adopt: bool) -> None:
        in_pool = {self.key(tenant, text) for text in resident}
        self.idle |= dict.fromkeys(in_pool & set(self.idle), self.now)
        kept = {key for key, since in self.idle.items() if since >= self.now - GRACE}
        gone = set(self.idle) - kept
        planned = self.store.collect(grace=GRACE, resident=in_pool, adopt=adopt, dry_run=True)
        done = self.store.collect(grace=GRACE, resident=in_pool, adopt=adopt)
        assert (planned.blobs, done.blobs, done.adopted) == (len(gone), len(gone), 0)
        assert self.store.collect(grace=GRACE).blobs == 0
        self.idle = {key: since for key, since in self.idle.items() if key in kept}

    @invariant()
    def every_reference_means_what_it_should(self) -> None:
        for (tenant, name), model in self.names.items():
            for base, selector in itertools.product((BASE, OTHER), ("latest", *model.aliases)):
                meaning = model.meaning(selector, base)
                with expected(meaning):
                    reference = f"{name}@{selector}"
                    target = self.store.resolve(tenant=tenant, reference=reference, base=base)
                    assert target.version == meaning
            shown = self.store.versions(tenant=tenant, name=name) if model.texts else ()
            assert {m.version: self.text_of(tenant, m.digest) for m in shown} == model.texts
            assert {m.version: m.fingerprint for m in shown} == model.fingerprints
            for manifest in shown:
                labels, note = model.described(manifest.version)
                assert (manifest.labels, manifest.metadata.get("note")) == (labels, note)
                assert manifest.aliases == model.aliases_of(manifest.version)
                assert manifest.base == {BASE.fingerprint: "tiny"}.get(
                    manifest.fingerprint, "other"
                )

    @invariant()
    def what_changed_has_a_revision_that_was_never_used(self) -> None:
        for (tenant, name), model in self.names.items():
            if not model.texts:
                continue
            now = self.store.versions(tenant=tenant, name=name)
            revision = now[0].prefix_revision
            before, earlier = self.shown.get((tenant, name), (0, ()))
            assert revision > before or now == earlier
            assert revision >= before
            known = {manifest.version: manifest for manifest in earlier}
            for manifest in now:
                assert before < manifest.revision <= revision or manifest == known.get(
                    manifest.version
                )
            self.shown[tenant, name] = (revision, now)

    @invariant()
    def each_base_has_its_own_versions(self) -> None:
        for (tenant, name), model in self.names.items():
            for base in (BASE, OTHER):
                meaning = model.meaning("latest", base)  # fails as the list does
                with expected(meaning):
                    shown = self.store.versions(tenant=tenant, name=name, base=base)
                    assert [m.version for m in shown] == model.versions_of(base)

    @invariant()
    def what_is_pinned_is_known(self) -> None:
        for base in (BASE, OTHER):
            pinned = {
                self.key(tenant, model.texts[model.pin])
                for (tenant, _), model in self.names.items()
                if model.pin is not None and model.fingerprints[model.pin] == base.fingerprint
            }
            assert {one.key for one in self.store.pinned(fingerprint=base.fingerprint)} == pinned
        for (tenant, name), model in self.names.items():
            for one in self.store.versions(tenant=tenant, name=name) if model.texts else ():
                assert one.pinned == (one.version == model.pin)

    @invariant()
    def the_watcher_receives_each_blob_without_references(self) -> None:
        meant = {
            self.key(tenant, text)
            for (tenant, _), model in self.names.items()
            for text in model.meant()
        }
        orphans = {key for change in self.told for key in change.orphans}
        assert orphans >= self.meant - meant
        assert not orphans & meant
        self.meant = meant
        self.told.clear()

    @invariant()
    def each_tenant_sees_its_own_names(self) -> None:
        for tenant in TENANTS:
            owned = sorted((n, model) for (t, n), model in self.names.items() if t == tenant)
            for base in (BASE, OTHER):
                page = self.store.list(tenant=tenant, base=base)
                assert [(m.name, m.version) for m in page.manifests] == [
                    (name, model.latest[base.fingerprint])
                    for name, model in owned
                    if base.fingerprint in model.latest
                ]
                care = [("team", "care")]
                page = self.store.list(tenant=tenant, base=base, labels=care)
                assert [m.name for m in page.manifests] == [
                    name
                    for name, model in owned
                    if model.has_label("team", "care", model.latest.get(base.fingerprint))
                ]
            listed = [(m.name, m.version) for m in self.store.list(tenant=tenant).manifests]
            assert listed == [
                (name, version)
                for name, model in owned
                for version in sorted(model.latest.values(), reverse=True)
            ]

    @invariant()
    def users_have_what_they_were_bound_to(self) -> None:
        for (tenant, user), reference in self.bound.items():
            assert self.bindings.chosen(tenant, user) == (reference, ChosenBy.USER)

    @invariant()
    def no_blob_is_missing_and_none_is_there_for_nothing(self) -> None:
        held = {key for key, _ in self.blobs.walk()}
        referenced = self.referenced()
        assert referenced <= held <= referenced | set(self.idle)

    def teardown(self) -> None:
        if self.engine is not None:
            self.engine.dispose()
            self.directory.cleanup()

    def name(self, tenant: str, name: str) -> Name:
        return self.names.setdefault((tenant, name), Name())

    def a_version(self, choice: int) -> tuple[str, str, int]:
        """One of the versions that exist, or seldom one that does not."""
        existing = [
            (tenant, name, version)
            for (tenant, name), model in self.names.items()
            for version in model.texts
        ]
        candidates = [*(3 * existing), ("acme", "a", 99)]
        return candidates[choice % len(candidates)]

    def referenced(self) -> set[BlobKey]:
        return {
            self.key(tenant, text)
            for (tenant, _), model in self.names.items()
            for text in model.texts.values()
        }

    def key(self, tenant: str, text: str) -> BlobKey:
        if text not in self.digests:
            self.digests[text] = pack_text(text, self.home / "packed").digest
        return BlobKey(tenant, self.digests[text])

    def put(self, tenant: str, name: str, text: str, *, base: BaseSpec, **options: Any) -> Any:
        return changes.publish_text(
            self.store,
            tenant=tenant,
            name=name,
            text=text,
            base=base,
            count_tokens=len,
            **{"metadata": None, **options},
        )

    @contextmanager
    def crash_when(self, stage: str) -> Iterator[dict[str, Any]]:
        """The store stops at ``stage`` of its next publish; yields options for that publish."""

        def crash(*_: Any, **__: Any) -> None:
            raise Crash

        def after(act: Callable[..., Any]) -> Callable[..., None]:
            def run(*arguments: Any, **options: Any) -> None:
                act(*arguments, **options)
                raise Crash

            return run

        change = self.store.change

        @contextmanager
        def changed(tenant: str) -> Iterator[CatalogTransaction]:
            with change(tenant) as tx:
                yield tx
            raise Crash

        with pytest.MonkeyPatch.context() as patch:
            if stage == "staged":
                patch.setattr(self.store._rows, "want", crash)
            elif stage == "wanted":
                patch.setattr(self.blobs, "put", crash)
            elif stage == "written":
                patch.setattr(self.blobs, "put", after(self.blobs.put))
            elif stage == "committed":
                patch.setattr(self.store, "change", changed)
            yield {"then": crash} if stage == "uncommitted" else {}

    def text_of(self, tenant: str, digest: str) -> str | None:
        path = self.store.fetch(tenant=tenant, digest=digest)
        return read_artifact(path, base=BASE, count_tokens=len).text


def run_machine(stack: Stack, *, examples: int) -> None:
    class Machine(StoreMachine):
        pass

    Machine.stack = staticmethod(stack)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_operations_match_the_model_on_sqlite_and_files() -> None:
    run_machine(lambda: ("sqlite:///HOME/catalog.sqlite", None), examples=20)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on a busy machine
def test_random_operations_match_the_model_on_postgres_and_s3(
    postgres_url: str, s3_url: str
) -> None:
    number = itertools.count()
    run_machine(lambda: (postgres_url, f"{s3_url}/{next(number)}"), examples=20)
