"""Many rollbacks and deletes of versions of one name, against the model of the store's machine,
where they are too rare to reach every case."""

import random
from collections import Counter

import pytest

from prefixd.store.artifact.base_spec import BaseSpec
from tests.store.store_artifacts import BASE
from tests.store.store_model import OTHER
from tests.store.test_store_machine import Crash, Stack, StoreMachine

ACTIONS = [*(4 * ["publish"]), *(3 * ["rollback"]), *(3 * ["delete"]), *(2 * ["use"])]
TEXTS = ["one", "two", "three", "four", "five", "six"]


def walk(stack: Stack, *, seed: int, steps: int) -> Counter[str]:
    """Random changes of what points at the versions of one name, all checked; how often each
    came to which outcome."""
    machine, draw, counts = StoreMachine(), random.Random(seed), Counter[str]()
    machine.stack = stack
    machine.start()
    model = machine.name("acme", "a")
    for _ in range(steps):
        base, end = draw.choice([BASE, OTHER]), draw.choice([None, None, None, Crash])
        latest = dict(model.latest)
        match draw.choice(ACTIONS):
            case "publish":
                machine.publish("acme", "a", draw.choice(TEXTS), base)
            case "rollback":
                machine.rollback(draw.randrange(100), base, end)
                counts["rollback"] += model.latest != latest
            case "delete":
                before = set(model.texts)
                machine.delete_version(draw.randrange(100), base, end)
                counts["delete"] += len(before) > len(model.texts)
                counts["latest moved"] += any(
                    model.latest.get(b, v) != v for b, v in latest.items()
                )
            case "use":
                use_a_version(machine, draw, base)
        machine.every_reference_means_what_it_should()
        machine.each_base_has_its_own_versions()
        machine.the_watcher_receives_each_blob_without_references()
        machine.no_blob_is_missing_and_none_is_there_for_nothing()
    machine.wait(25)
    machine.collect("acme", [], adopt=False)  # the blobs of deleted versions are gone
    machine.no_blob_is_missing_and_none_is_there_for_nothing()
    machine.teardown()
    return counts


def use_a_version(machine: StoreMachine, draw: random.Random, base: BaseSpec) -> None:
    """Set or remove an alias, a pin or a binding; mostly remove, or no version could be deleted."""
    match draw.choice(["alias", "no alias", "no alias", "pin", "unpin", "unpin", "bind"]):
        case "alias":
            machine.set_alias("acme", "a", "prod", draw.choice([1, 2, 3, "latest"]), base)
        case "no alias":
            machine.remove_alias("acme", "a", "prod")
        case "pin":
            machine.pin("acme", draw.choice(["a", "a@2", "a@prod"]), base)
        case "unpin":
            machine.unpin("acme", "a")
        case "bind":
            machine.bind("acme", "bob", draw.choice(["a", "a@1", "a@latest", "b"]))


@pytest.mark.slow
def test_versions_of_one_name_match_the_model_on_sqlite() -> None:
    counts = walk(lambda: ("sqlite:///HOME/catalog.sqlite", None), seed=1, steps=150)
    assert min(counts["rollback"], counts["delete"], counts["latest moved"]) >= 3


@pytest.mark.slow
def test_versions_of_one_name_match_the_model_on_postgres(postgres_url: str) -> None:
    counts = walk(lambda: (postgres_url, None), seed=3, steps=100)
    assert min(counts["rollback"], counts["delete"], counts["latest moved"]) >= 3
