"""The store as its callers see it."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefixd.store.artifact.artifact import read_artifact
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.errors import (
    ArtifactRefused,
    CorruptArtifact,
    InvalidReference,
    StoreError,
    UnknownPrefix,
)
from prefixd.store.names import BlobKey
from prefixd.store.store import Change
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE, config_bytes, multitask, soft, spool
from tests.store.store_home import Home


def test_a_manifest_has_all_fields_of_its_version(home: Home) -> None:
    config = config_bytes("P_TUNING", base_model_name_or_path="org/tiny")
    published = changes.publish_peft(
        home.store,
        tenant="acme",
        name="style",
        config=config,
        weights=spool(home.path, soft(dtype="BF16")),
        metadata={"label": "ü"},
        base=BASE,
    )
    manifest = published.manifest
    assert published.created
    assert (manifest.tenant, manifest.name, manifest.version) == ("acme", "style", 1)
    assert (manifest.kind, manifest.peft_type) == ("soft_prompt", "P_TUNING")
    assert (manifest.num_virtual_tokens, manifest.dtype) == (4, "bfloat16")
    assert (manifest.fingerprint, manifest.base_model_name_or_path) == ("f" * 64, "org/tiny")
    assert (manifest.metadata, manifest.aliases) == ({"label": "ü"}, ("latest",))
    assert abs(datetime.now(UTC) - manifest.created_at) < timedelta(minutes=1)
    path = home.store.fetch(tenant="acme", digest=manifest.digest)
    assert path.stat().st_size == manifest.size_bytes
    assert read_artifact(path, base=BASE, count_tokens=len).peft_type == "P_TUNING"


def test_the_same_content_gets_the_same_version_and_latest_moves_to_it(home: Home) -> None:
    first = home.put(seed=1)
    home.put(seed=2)
    assert home.store.resolve(tenant="acme", reference="style", base=BASE).version == 2
    again = home.put(seed=1)
    assert (again.created, again.manifest) == (False, first.manifest)
    assert home.store.resolve(tenant="acme", reference="style", base=BASE).version == 1
    assert home.put(seed=3).manifest.version == 3


def test_the_same_content_for_another_base_gets_another_version(home: Home) -> None:
    first = home.put().manifest
    other = replace(BASE, fingerprint="0" * 64)
    second = changes.publish_peft(
        home.store,
        tenant="acme",
        name="style",
        config=config_bytes(),
        weights=spool(home.path, (home.path / "weights").read_bytes()),
        metadata=None,
        base=other,
    ).manifest
    assert (second.version, second.fingerprint) == (2, "0" * 64)
    assert second.digest == first.digest


def test_different_task_ids_make_different_versions(home: Home) -> None:
    def put(task_id: int) -> int:
        published = changes.publish_peft(
            home.store,
            tenant="acme",
            name="tasks",
            config=config_bytes("MULTITASK_PROMPT_TUNING"),
            weights=spool(home.path, multitask()),
            metadata={"task_id": task_id},
            base=BASE,
            task_id=task_id,
        )
        return published.manifest.version

    assert [put(0), put(1), put(0)] == [1, 2, 1]


def test_a_text_is_published_and_read_back(home: Home) -> None:
    def put(text: str) -> Any:
        return changes.publish_text(
            home.store,
            tenant="acme",
            name="text",
            text=text,
            metadata=None,
            base=BASE,
            count_tokens=len,
        )

    manifest = put("Be brief.").manifest
    assert (manifest.kind, manifest.num_virtual_tokens, manifest.dtype) == ("hard_prompt", 9, None)
    assert not put("Be brief.").created
    path = home.store.fetch(tenant="acme", digest=manifest.digest)
    assert read_artifact(path, base=BASE, count_tokens=len).text == "Be brief."


def test_references_resolve_by_version_and_alias(home: Home) -> None:
    for seed in range(3):
        home.put(seed=seed)
    changes.set_alias(home.store, tenant="acme", name="style", alias="prod", version=1)
    moved = changes.set_alias(home.store, tenant="acme", name="style", alias="prod", version=2)
    changes.set_alias(home.store, tenant="acme", name="style", alias="a", version=3)
    assert (moved.version, moved.aliases) == (2, ("prod",))
    found = {
        reference: home.store.resolve(tenant="acme", reference=reference, base=BASE).version
        for reference in ("style", "style@latest", "style@prod", "style@1", "style@a")
    }
    assert found == {
        "style": 3,
        "style@latest": 3,
        "style@prod": 2,
        "style@1": 1,
        "style@a": 3,
    }
    listed = home.store.versions(tenant="acme", name="style")
    assert [(m.version, m.aliases) for m in listed] == [
        (3, ("a", "latest")),
        (2, ("prod",)),
        (1, ()),
    ]
    changes.remove_alias(home.store, tenant="acme", name="style", alias="prod")
    assert home.store.manifest(tenant="acme", name="style", version=2, base=BASE).aliases == ()
    with pytest.raises(UnknownPrefix, match="style@prod"):
        changes.remove_alias(home.store, tenant="acme", name="style", alias="prod")


def test_version_numbers_are_never_reused(home: Home) -> None:
    home.put(seed=1)
    home.put(seed=2)
    changes.set_alias(home.store, tenant="acme", name="style", alias="prod", version=1)
    assert changes.delete(home.store, tenant="acme", name="style") == 2
    for reference in ("style", "style@1", "style@prod"):
        with pytest.raises(UnknownPrefix):
            home.store.resolve(tenant="acme", reference=reference, base=BASE)
    assert home.store.list(tenant="acme").manifests == ()
    with pytest.raises(UnknownPrefix):
        changes.delete(home.store, tenant="acme", name="style")
    again = home.put(seed=1)
    assert (again.created, again.manifest.version, again.manifest.aliases) == (True, 3, ("latest",))


Ask = Callable[[Home, str], object]
ASKED: dict[str, Ask] = {
    "resolve": lambda home, name: home.store.resolve(tenant="acme", reference=name, base=BASE),
    "resolve version": lambda home, name: home.store.resolve(
        tenant="acme", reference=name + "@1", base=BASE
    ),
    "resolve alias": lambda home, name: home.store.resolve(
        tenant="acme", reference=name + "@prod", base=BASE
    ),
    "manifest": lambda home, name: home.store.manifest(
        tenant="acme", name=name, version=1, base=BASE
    ),
    "versions": lambda home, name: home.store.versions(tenant="acme", name=name),
    "set alias": lambda home, name: changes.set_alias(
        home.store, tenant="acme", name=name, alias="prod", version=1
    ),
    "remove alias": lambda home, name: changes.remove_alias(
        home.store, tenant="acme", name=name, alias="prod"
    ),
    "delete": lambda home, name: changes.delete(home.store, tenant="acme", name=name),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_prefix_of_another_tenant_is_unknown(home: Home, ask: Ask) -> None:
    home.put("theirs", tenant="umbrella")
    changes.set_alias(home.store, tenant="umbrella", name="theirs", alias="prod", version=1)
    messages = []
    for name in ("theirs", "absent"):
        with pytest.raises(UnknownPrefix) as unknown:
            ask(home, name)
        messages.append(unknown.value.message.replace(name, "NAME"))
    assert messages[0] == messages[1]
    assert home.store.resolve(tenant="umbrella", reference="theirs@prod", base=BASE).version == 1
    assert home.store.list(tenant="acme").manifests == ()


def test_two_tenants_may_use_the_same_name(home: Home) -> None:
    ours = home.put(seed=1).manifest
    theirs = home.put(seed=1, tenant="umbrella").manifest
    assert ours.digest == theirs.digest
    changes.delete(home.store, tenant="umbrella", name="style")
    assert home.store.resolve(tenant="acme", reference="style", base=BASE) == ours


@pytest.mark.parametrize("version", [-1, 0, 2, 2**31, 2**63, 10**40])
def test_impossible_versions_are_not_found(home: Home, version: int) -> None:
    home.put()
    with pytest.raises(UnknownPrefix):
        home.store.manifest(tenant="acme", name="style", version=version, base=BASE)
    with pytest.raises(UnknownPrefix):
        changes.set_alias(home.store, tenant="acme", name="style", alias="prod", version=version)


def test_prefixes_are_listed_by_name_in_pages(home: Home) -> None:
    names = ["b", "B", "a.1", "a", "c-2"]
    for name in names:
        home.put(name, seed=1)
        home.put(name, seed=2)
    seen: list[str] = []
    after = None
    pages = 0
    while pages == 0 or after is not None:
        page = home.store.list(tenant="acme", limit=2, after=after)
        seen += [manifest.name for manifest in page.manifests]
        assert all(manifest.version == 2 for manifest in page.manifests)
        after = page.next_after
        pages += 1
    assert (seen, pages) == (sorted(names), 3)


def test_all_state_survives_a_restart(open_home: Callable[[], Home]) -> None:
    first = open_home()
    before = first.put(seed=1).manifest
    first.put(seed=2)
    changes.set_alias(first.store, tenant="acme", name="style", alias="prod", version=1)
    second = open_home()
    found = second.store.resolve(tenant="acme", reference="style@prod", base=BASE)
    assert found == replace(before, aliases=("prod",))
    assert second.store.fetch(tenant="acme", digest=found.digest).is_file()
    assert not second.put(seed=2).created


def test_a_rejected_upload_leaves_no_files(home: Home) -> None:
    with pytest.raises(ArtifactRefused):
        home.put(seed=float("nan"))
    with pytest.raises(UnknownPrefix):
        home.store.resolve(tenant="acme", reference="style", base=BASE)
    assert home.held() == set()


CONTENTS = [b"", b"something else"]


@pytest.mark.parametrize("content", CONTENTS)
def test_a_corrupt_blob_is_quarantined_and_not_served_until_it_is_repaired(
    home: Home, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    manifest = home.put().manifest
    key = BlobKey("acme", manifest.digest)
    sound = home.store.fetch(tenant="acme", digest=manifest.digest).read_bytes()
    home.damage(key.place, content)
    for _ in range(2):
        with pytest.raises(CorruptArtifact, match=manifest.digest):
            home.store.fetch(tenant="acme", digest=manifest.digest)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert manifest.digest in caplog.text
    assert home.store.resolve(tenant="acme", reference="style", base=BASE) == replace(
        manifest, corrupt=True
    )
    home.damage(key.place, sound)  # still not served: it has not been verified
    with pytest.raises(CorruptArtifact, match="quarantine"):
        home.store.fetch(tenant="acme", digest=manifest.digest)
    home.damage(key.place, content)
    assert home.put().manifest == manifest
    path = home.store.fetch(tenant="acme", digest=manifest.digest)
    assert path.read_bytes() == sound


def test_a_missing_blob_is_reported_like_a_corrupt_one(home: Home) -> None:
    manifest = home.put().manifest
    home.blobs.delete(tenant="acme", digest=manifest.digest)
    with pytest.raises(CorruptArtifact, match="gone"):
        home.store.fetch(tenant="acme", digest=manifest.digest)
    assert home.store.resolve(tenant="acme", reference="style", base=BASE).corrupt
    with pytest.raises(UnknownPrefix):
        home.store.fetch(tenant="umbrella", digest=manifest.digest)
    home.put()
    assert home.store.fetch(tenant="acme", digest=manifest.digest).is_file()


def test_known_metadata_fields_appear_in_the_manifest(home: Home) -> None:
    said = {
        "labels": {"team": "search"},
        "description": "Answers in one line.",
        "prompt_template": "Q: {prompt}\nA:",
        "base_fingerprint": BASE.fingerprint,
        "trained_by": ["us"],
    }
    manifest = home.put(metadata=said, creator="key 1").manifest
    assert (manifest.labels, manifest.description) == ({"team": "search"}, "Answers in one line.")
    assert (manifest.prompt_template, manifest.creator) == ("Q: {prompt}\nA:", "key 1")
    assert manifest.metadata == {"trained_by": ["us"]}
    assert not manifest.corrupt


def test_a_prefix_for_another_base_is_rejected_and_the_message_names_both(home: Home) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        home.put(metadata={"base_fingerprint": "another"})
    assert (refusal.value.code, refusal.value.param) == ("wrong_base", "metadata.base_fingerprint")
    assert all(name in refusal.value.message for name in (BASE.name, BASE.fingerprint, "'another'"))
    assert home.held() == set()


def test_a_failed_transaction_changes_nothing(home: Home) -> None:
    seen: list[Any] = []

    def refuse(tx: CatalogTransaction, result: Any) -> None:
        assert tx.connection.in_transaction()
        seen.append(result)
        raise RuntimeError("over the quota")

    store = home.store
    first = home.put(seed=1)
    assert store.resolve(tenant="acme", reference="style", base=BASE) == first.manifest
    before = changes.set_alias(store, tenant="acme", name="style", alias="prod", version=1)
    refused: list[Callable[[CatalogTransaction], object]] = [
        lambda tx: tx.set_alias("style", "next", version=1, base=BASE),
        lambda tx: tx.remove_alias("style", "prod"),
        lambda tx: tx.delete("style"),
    ]
    with pytest.raises(RuntimeError, match="quota"):
        home.put(
            seed=2, then=lambda tx: refuse(tx, tx.set_alias("style", "next", version=2, base=BASE))
        )
    assert store.versions(tenant="acme", name="style") == (before,)
    for change in refused:
        with pytest.raises(RuntimeError, match="quota"), store.change("acme") as tx:
            refuse(tx, change(tx))
        assert store.versions(tenant="acme", name="style") == (before,)
    assert (seen[0].version, seen[0].aliases) == (2, ("latest", "next"))
    assert seen[1:] == [replace(before, aliases=("latest", "next", "prod")), None, 1]


def test_a_block_of_changes_is_one_transaction(home: Home) -> None:
    told: list[Change] = []
    first = home.put(seed=1).manifest
    home.store.watch(told.append)

    def move_prod(tx: CatalogTransaction) -> None:
        tx.set_alias("style", "prod", version=1, base=BASE)
        tx.set_pin("style@prod", base=BASE)
        assert told == []

    home.put(seed=2, then=move_prod)
    assert told == [Change(pins=True)]  # version 1 lost ``latest`` and got an alias and a pin
    with home.store.change("acme") as tx:
        tx.remove_pin("style")
        tx.set_alias("style", "prod", version=2, base=BASE)
        tx.set_alias("style", "old", version=1, base=BASE)
        tx.remove_alias("style", "old")
    assert told[1:] == [Change((BlobKey("acme", first.digest),), pins=True)]


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": float("nan")},
        {"a": object()},
        {"a": "\ud800"},
        {"a": "x" * 20000},
        [1],
        {"labels": ["a"]},
        {"labels": {"a": 1}},
        {"labels": {"a": "x" * 129}},
        {"labels": {str(n): "" for n in range(33)}},
        {"description": 1},
        {"prompt_template": ["Q"]},
        {"base_fingerprint": {}},
    ],
)
def test_metadata_other_than_a_small_json_object_is_rejected(home: Home, metadata: Any) -> None:
    with pytest.raises(ArtifactRefused) as refusal:
        changes.publish_text(
            home.store,
            tenant="acme",
            name="a",
            text="x",
            metadata=metadata,
            base=BASE,
            count_tokens=len,
        )
    assert refusal.value.code == "malformed_metadata"
    assert str(refusal.value.param).startswith("metadata")


@pytest.mark.parametrize(("tenant", "name"), [("acme", "a b"), ("../acme", "a"), ("acme", "a@1")])
def test_invalid_names_are_rejected_before_anything_is_written(
    home: Home, tenant: str, name: str
) -> None:
    with pytest.raises(InvalidReference):
        home.put(name, tenant=tenant)
    assert issubclass(InvalidReference, StoreError)
    assert home.held() == set()
