"""Pins, and versions that a change leaves without references, on both stacks."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from prefixd.store.catalog.pins import Pinned
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.errors import InvalidReference, UnknownPrefix
from prefixd.store.names import BlobKey
from prefixd.store.store import Change
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home


def pins(home: Home) -> list[tuple[str, str, int]]:
    found = home.store.pinned(fingerprint=BASE.fingerprint)
    return [(one.key.tenant, one.key.digest, one.num_virtual_tokens) for one in found]


@pytest.fixture
def told(home: Home) -> list[Change]:
    """The calls of the watcher."""
    changes: list[Change] = []
    home.store.watch(changes.append)
    return changes


def test_a_pin_refers_to_one_version_and_survives_a_restart(
    open_home: Callable[[], Home],
) -> None:
    home = open_home()
    first = home.put_text("one").manifest
    second = home.put_text("second").manifest
    assert not first.pinned
    made = changes.set_pin(home.store, tenant="acme", reference="style")
    assert (made.version, made.pinned) == (2, True)
    home.put_text("third")
    again = open_home()
    assert pins(again) == [("acme", second.digest, 6)]
    shown = {one.version: one.pinned for one in again.store.versions(tenant="acme", name="style")}
    assert shown == {1: False, 2: True, 3: False}
    changes.set_pin(again.store, tenant="acme", reference="style@1")
    assert pins(again) == [("acme", first.digest, 3)]
    changes.remove_pin(again.store, tenant="acme", name="style")
    assert pins(again) == []
    with pytest.raises(UnknownPrefix):
        changes.remove_pin(again.store, tenant="acme", name="style")


def test_missing_versions_and_invalid_references_cannot_be_pinned(home: Home) -> None:
    home.put_text("one")
    for reference in ("other", "style@2", "style@prod", "style@99999999999"):
        with pytest.raises(UnknownPrefix):
            changes.set_pin(home.store, tenant="acme", reference=reference)
        with pytest.raises(UnknownPrefix):
            changes.set_pin(home.store, tenant="umbrella", reference=reference)
    with pytest.raises(InvalidReference):
        changes.set_pin(home.store, tenant="acme", reference="a b")
    with pytest.raises(UnknownPrefix) as foreign:
        changes.remove_pin(home.store, tenant="umbrella", name="style")
    with pytest.raises(UnknownPrefix) as unpinned:
        changes.remove_pin(home.store, tenant="acme", name="style")
    assert str(foreign.value) == str(unpinned.value)
    assert pins(home) == []


def test_equal_bytes_are_listed_once_for_each_tenant(home: Home) -> None:
    digest = home.put_text("one", "a").manifest.digest
    home.put_text("one", "b")
    home.put_text("one", "a", tenant="umbrella")
    for tenant, name in (("acme", "a"), ("acme", "b"), ("umbrella", "a")):
        changes.set_pin(home.store, tenant=tenant, reference=name)
    assert pins(home) == [("acme", digest, 3), ("umbrella", digest, 3)]
    changes.remove_pin(home.store, tenant="acme", name="a")
    assert pins(home) == [("acme", digest, 3), ("umbrella", digest, 3)]
    assert home.store.pinned(fingerprint="another base") == ()


def test_pins_are_listed_oldest_first(home: Home) -> None:
    for name in ("b", "a", "c"):
        home.put_text(f"text {name}", name)
        home.clock.ahead += timedelta(seconds=1)
        changes.set_pin(home.store, tenant="acme", reference=name)
    home.clock.ahead += timedelta(seconds=1)
    changes.set_pin(home.store, tenant="acme", reference="b")
    digests = [
        home.store.resolve(tenant="acme", reference=name, base=BASE).digest for name in "acb"
    ]
    assert [digest for _, digest, _ in pins(home)] == digests


def test_a_pin_of_a_corrupt_blob_is_not_listed_until_it_is_repaired(home: Home) -> None:
    manifest = home.put_text("one").manifest
    changes.set_pin(home.store, tenant="acme", reference="style")
    home.store._report_corrupt(BlobKey("acme", manifest.digest), "damaged")
    assert pins(home) == []
    assert home.put_text("one").manifest.pinned
    assert pins(home) == [("acme", manifest.digest, 3)]


def test_a_rejected_pin_changes_nothing(home: Home, told: list[Change]) -> None:
    home.put_text("one")

    def refused(change: Callable[[CatalogTransaction], object]) -> None:
        with home.store.change("acme") as tx:
            change(tx)
            raise PermissionError

    with pytest.raises(PermissionError):
        refused(lambda tx: tx.set_pin("style", base=BASE))
    assert pins(home) == []
    changes.set_pin(home.store, tenant="acme", reference="style")
    told.clear()
    with pytest.raises(PermissionError):
        refused(lambda tx: tx.remove_pin("style"))
    assert len(pins(home)) == 1
    assert told == []


def test_the_watcher_receives_versions_without_references(home: Home, told: list[Change]) -> None:
    keys = {text: BlobKey("acme", home.put_text(text).manifest.digest) for text in ("one", "two")}
    assert told == [Change((keys["one"],))]
    told.clear()
    store = home.store
    changes.set_alias(store, tenant="acme", name="style", alias="prod", version=1)
    changes.set_pin(store, tenant="acme", reference="style@1")
    changes.remove_alias(store, tenant="acme", name="style", alias="prod")
    home.put_text("two")
    assert told == [Change(pins=True)]
    told.clear()
    changes.remove_pin(store, tenant="acme", name="style")
    assert told == [Change((keys["one"],), pins=True)]
    told.clear()
    changes.set_alias(store, tenant="acme", name="style", alias="prod", version=1)
    changes.set_alias(store, tenant="acme", name="style", alias="prod", version=2)
    assert told == [Change((keys["one"],))]
    told.clear()
    home.put_text("one", "other")
    changes.set_pin(store, tenant="acme", reference="style@2")
    assert told == [Change(pins=True)]
    told.clear()
    changes.delete(store, tenant="acme", name="style")
    assert told == [Change((keys["two"],), pins=True)]
    assert pins(home) == []


def test_names_of_another_tenant_do_not_count_as_references(home: Home, told: list[Change]) -> None:
    digest = home.put_text("one").manifest.digest
    home.put_text("one", tenant="umbrella")
    changes.delete(home.store, tenant="acme", name="style")
    assert told == [Change((BlobKey("acme", digest),))]


def test_a_deleted_prefix_loses_its_pin_permanently(home: Home) -> None:
    home.put_text("one")
    changes.set_pin(home.store, tenant="acme", reference="style")
    changes.delete(home.store, tenant="acme", name="style")
    assert not home.put_text("one").manifest.pinned
    assert pins(home) == []


def test_versions_are_listed_in_pages(home: Home) -> None:
    for text in ("one", "two", "three"):
        home.put_text(text)

    def part(**asked: Any) -> list[int]:
        found = home.store.versions(tenant="acme", name="style", **asked)
        return [one.version for one in found]

    assert part() == [3, 2, 1]
    assert part(limit=2) == [3, 2]
    assert part(limit=2, before=2) == [1]
    assert part(before=1) == []
    with pytest.raises(UnknownPrefix):
        home.store.versions(tenant="umbrella", name="style", before=1)


def test_pins_are_listed_as_values(home: Home) -> None:
    manifest = home.put_text("one").manifest
    changes.set_pin(home.store, tenant="acme", reference="style", creator="k1")
    assert home.store.pinned(fingerprint=BASE.fingerprint) == (
        Pinned(BlobKey("acme", manifest.digest), 3),
    )
