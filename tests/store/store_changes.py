"""Single changes to a store, each in its own transaction."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.catalog.changes import Removed
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.store import Manifest, PrefixStore, Published
from tests.store.store_artifacts import BASE

Then = Callable[[CatalogTransaction], object]
"""Runs in the transaction after the change; what it raises rolls the change back."""


def publish_peft(store: PrefixStore, *, then: Then | None = None, **options: Any) -> Published:
    return _published(store.publish_peft(**options), then)


def publish_text(store: PrefixStore, *, then: Then | None = None, **options: Any) -> Published:
    return _published(store.publish_text(**options), then)


def publish_artifact(store: PrefixStore, *, then: Then | None = None, **options: Any) -> Published:
    return _published(store.publish_artifact(**options), then)


def _published(
    publish: AbstractContextManager[tuple[CatalogTransaction, Published]], then: Then | None
) -> Published:
    with publish as (tx, published):
        if then is not None:
            then(tx)
    return published


def set_alias(
    store: PrefixStore,
    *,
    tenant: str,
    name: str,
    alias: str,
    version: int | str,
    base: BaseSpec = BASE,
) -> Manifest:
    with store.change(tenant) as tx:
        return tx.set_alias(name, alias, version=version, base=base)


def remove_alias(store: PrefixStore, *, tenant: str, name: str, alias: str) -> None:
    with store.change(tenant) as tx:
        tx.remove_alias(name, alias)


def set_pin(
    store: PrefixStore,
    *,
    tenant: str,
    reference: str,
    creator: str | None = None,
    base: BaseSpec = BASE,
) -> Manifest:
    with store.change(tenant) as tx:
        return tx.set_pin(reference, creator=creator, base=base)


def remove_pin(store: PrefixStore, *, tenant: str, name: str) -> None:
    with store.change(tenant) as tx:
        tx.remove_pin(name)


def delete(store: PrefixStore, *, tenant: str, name: str) -> int:
    with store.change(tenant) as tx:
        return tx.delete(name)


def delete_version(
    store: PrefixStore, *, tenant: str, name: str, version: int, base: BaseSpec = BASE
) -> Removed:
    with store.change(tenant) as tx:
        return tx.delete_version(name, version, base=base)
