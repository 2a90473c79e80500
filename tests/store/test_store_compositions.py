"""Stacks, blends and ensembles in the catalog, on both stacks."""

from collections.abc import Sequence
from typing import Any

import pytest

from prefixd.store.artifact.composition import (
    Combine,
    Member,
    composition_payload,
    encoded_runs,
    parse_payload,
)
from prefixd.store.artifact.kinds import Kind
from prefixd.store.errors import ArtifactRefused, BaseMismatch, MemberDeleted, UnknownPrefix
from prefixd.store.integrity import Problem, StoreIntegrity
from prefixd.store.names import BlobKey
from prefixd.store.store import Published
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home
from tests.store.store_model import OTHER


def count(parts: Sequence[str | int]) -> int:
    return sum(part if isinstance(part, int) else len(part) for part in parts)


def save(
    home: Home,
    name: str,
    kind: Kind,
    members: Sequence[tuple[str, float | None]],
    *,
    tenant: str = "acme",
    combine: Combine | None = None,
    **options: Any,
) -> Published:
    publish = home.store.publish_composition(
        tenant=tenant,
        name=name,
        kind=kind,
        members=members,
        combine=combine,
        count_stack=count,
        **{"metadata": None, "base": BASE, **options},
    )
    with publish as (_, published):
        return published


@pytest.fixture
def full(home: Home) -> Home:
    """Two soft prompts of four rows and a text of five tokens."""
    home.put("a", seed=1.0)
    home.put("b", seed=2.0)
    home.put_text("hello", "t")
    return home


def test_what_is_the_same_is_the_same_version(full: Home) -> None:
    blend = [("a", 0.25), ("b", 0.75)]
    first = save(full, "mix", Kind.BLEND, blend)
    assert (first.created, first.manifest.num_virtual_tokens) == (True, 4)
    assert [member.reference for member in first.manifest.members] == ["a@1", "b@1"]
    again = save(full, "mix", Kind.BLEND, [("a@1", 0.25), ("b@latest", 0.75)])
    assert (again.created, again.manifest) == (False, first.manifest)
    others = [
        save(full, "mix", Kind.BLEND, [("a", 0.5), ("b", 0.5)]),
        save(full, "mix", Kind.STACK, [("a", None), ("t", None)]),
        save(full, "mix", Kind.STACK, [("t", None), ("a", None)]),
        save(full, "mix", Kind.ENSEMBLE, [("a", None), ("b", None)], combine=Combine.VOTE),
        save(full, "mix", Kind.ENSEMBLE, [("a", None), ("b", None)], combine=Combine.MEAN_LOGPROB),
    ]
    full.put("a", seed=3.0)
    others.append(save(full, "mix", Kind.BLEND, blend))
    assert [other.manifest.version for other in others] == [2, 3, 4, 5, 6, 7]
    counts = [other.manifest.num_virtual_tokens for other in others]
    assert counts == [4, 9, 9, 8, 8, 4]
    shown = full.store.versions(tenant="acme", name="mix")
    assert shown[1].combine is Combine.MEAN_LOGPROB
    assert full.store.present_members(shown[1])[0].version == 1


def test_members_are_those_of_the_tenant_and_the_base(full: Home) -> None:
    for name in ("missing", "a@9", "a@prod"):
        with pytest.raises(UnknownPrefix, match=name.partition("@")[0]):
            save(full, "mix", Kind.STACK, [("t", None), (name, None)])
    with pytest.raises(UnknownPrefix, match="no prefix a"):
        save(full, "mix", Kind.STACK, [("a", None)], tenant="umbrella")
    with pytest.raises(BaseMismatch, match="prefix a"):
        save(full, "mix", Kind.STACK, [("a", None)], base=OTHER)
    with pytest.raises(ArtifactRefused, match="at most 64 virtual tokens"):
        save(full, "mix", Kind.STACK, [("a", None)] * 17)
    with pytest.raises(UnknownPrefix):
        full.store.resolve(tenant="acme", reference="mix", base=BASE)


def test_deleted_members_are_named_by_uses_the_check_and_pins(full: Home) -> None:
    manifest = save(full, "mix", Kind.STACK, [("a", None), ("b", None), ("a", None)]).manifest
    outer = save(full, "outer", Kind.ENSEMBLE, [("mix", None), ("t", None)], combine=Combine.VOTE)
    for name in ("mix", "outer"):
        changes.set_pin(full.store, tenant="acme", reference=name)
    pins = full.store.pinned(fingerprint=BASE.fingerprint)
    keys = [(pin.key.digest, pin.num_virtual_tokens) for pin in pins]
    text = full.store.resolve(tenant="acme", reference="t", base=BASE)
    assert keys == [(manifest.digest, 12), (text.digest, 5)]
    changes.delete(full.store, tenant="acme", name="a")
    assert full.store.pinned(fingerprint=BASE.fingerprint) == ()
    for one in (manifest, outer.manifest):
        with pytest.raises(MemberDeleted, match=r"members of it were deleted \(a@1\)"):
            full.store.present_members(one)
    with pytest.raises(MemberDeleted):
        save(full, "more", Kind.ENSEMBLE, [("mix", None), ("t", None)], combine=Combine.VOTE)
    check = StoreIntegrity(full.database, full.blobs, upload_dir=full.path / "uploads")
    findings = [(one.problem, one.subject) for one in check.findings()]
    missing = Problem.TARGET_MISSING
    assert sorted(findings) == [(missing, "mix@1"), (missing, "outer@1")]


def test_all_deleted_members_are_named_also_those_of_members(full: Home) -> None:
    save(full, "one", Kind.STACK, [("a", None)])
    save(full, "two", Kind.STACK, [("b", None)])
    members = [("one", None), ("two", None), ("t", None)]
    outer = save(full, "outer", Kind.ENSEMBLE, members, combine=Combine.VOTE).manifest
    for name in ("a", "b", "t"):
        changes.delete(full.store, tenant="acme", name=name)
    with pytest.raises(MemberDeleted, match=r"\(a@1, b@1, t@1\)"):
        full.store.present_members(outer)


def test_a_pin_of_a_composition_with_a_corrupt_member_is_not_listed(full: Home) -> None:
    save(full, "mix", Kind.STACK, [("a", None), ("b", None)])
    changes.set_pin(full.store, tenant="acme", reference="mix")
    (pin,) = full.store.pinned(fingerprint=BASE.fingerprint)
    assert [member.reference for member in pin.members] == ["a@1", "b@1"]
    full.store._report_corrupt(BlobKey("acme", pin.members[0].digest), "damaged")
    assert full.store.pinned(fingerprint=BASE.fingerprint) == ()


def test_blobs_of_compositions_are_collected_with_their_versions(full: Home) -> None:
    manifest = save(full, "mix", Kind.STACK, [("a", None)]).manifest
    assert full.store.fetch(tenant="acme", digest=manifest.digest).stat().st_size > 0
    changes.delete(full.store, tenant="acme", name="mix")
    assert full.store.deleted([BlobKey("acme", manifest.digest)])


MEMBERS = (
    Member("a", 1, "0" * 64, Kind.SOFT_PROMPT, 0.25),
    Member("b", 2, "1" * 64, Kind.SOFT_PROMPT, 0.75),
)


def test_a_payload_has_one_spelling() -> None:
    payload = composition_payload(MEMBERS, None)
    assert parse_payload(Kind.BLEND, payload) == (MEMBERS, None)
    wrong: list[tuple[Kind, bytes]] = [
        (Kind.STACK, payload),
        (Kind.ENSEMBLE, payload),
        (Kind.BLEND, payload.replace(b"0.25", b"0.26")),
        (Kind.BLEND, payload.replace(b"0.25", b"0.250")),
        (Kind.BLEND, payload.replace(b"0.25", b'"0.25"')),
        (Kind.BLEND, payload + b" "),
        (Kind.BLEND, payload.replace(b"a@1", b"a@x")),
        (Kind.BLEND, payload.replace(b"soft_prompt", b"soft")),
        (Kind.BLEND, b"{}"),
        (Kind.BLEND, b"[]"),
        (Kind.BLEND, b"\xff"),
        (Kind.BLEND, b'{"combine":null,"members":[1]}'),
        (Kind.BLEND, composition_payload(MEMBERS, Combine.VOTE)),
    ]
    for kind, content in wrong:
        with pytest.raises(ArtifactRefused, match="it does not hold the members of a"):
            parse_payload(kind, content)


class Opening:
    """A tokenizer of characters with one opening token."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [*map(ord, text)]

    def encode_prefix(self, text: str) -> list[int]:
        return [1, *map(ord, text)]

    def without_opening(self, token_ids: list[int]) -> list[int]:
        return token_ids[1:] if token_ids[:1] == [1] else token_ids


def test_texts_next_to_each_other_are_one_and_only_the_first_run_is_opened() -> None:
    runs = encoded_runs([7, "ab", "c", 3, 4, "\x01d", "e"], Opening())
    assert runs == [7, (1, 97, 98, 99), 3, 4, (100, 101)]
    assert encoded_runs(["ab", "c"], Opening()) == encoded_runs(["abc"], Opening())
