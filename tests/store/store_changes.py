"""Single changes to a store, each in its own transaction."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.store import Manifest, PrefixStore, Published

Then = Callable[[CatalogTransaction], object]
"""Runs in the transaction after the change; what it raises rolls the change back."""


def publish_peft(store: PrefixStore, *, then: Then | None = None, **options: Any) -> Published:
    return _published(store.publish_peft(**options), then)


def publish_text(store: PrefixStore, *, then: Then | None = None, **options: Any) -> Published:
    return _published(store.publish_text(**options), then)


def _published(
    publish: AbstractContextManager[tuple[CatalogTransaction, Published]], then: Then | None
) -> Published:
    with publish as (tx, published):
        if then is not None:
            then(tx)
    return published


def set_alias(
    store: PrefixStore, *, tenant: str, name: str, alias: str, version: int | str
) -> Manifest:
    with store.change(tenant) as tx:
        return tx.set_alias(name, alias, version=version)


def remove_alias(store: PrefixStore, *, tenant: str, name: str, alias: str) -> None:
    with store.change(tenant) as tx:
        tx.remove_alias(name, alias)


def set_pin(
    store: PrefixStore, *, tenant: str, reference: str, creator: str | None = None
) -> Manifest:
    with store.change(tenant) as tx:
        return tx.set_pin(reference, creator=creator)


def remove_pin(store: PrefixStore, *, tenant: str, name: str) -> None:
    with store.change(tenant) as tx:
        tx.remove_pin(name)


def delete(store: PrefixStore, *, tenant: str, name: str) -> int:
    with store.change(tenant) as tx:
        return tx.delete(name)
