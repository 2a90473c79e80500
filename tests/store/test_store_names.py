"""Names and references."""

import pytest

from prefixd.store.errors import InvalidReference
from prefixd.store.names import BlobKey, Reference, check_alias, check_name, parse_reference

BAD_NAMES = ["", "-a", ".a", "_a", "a b", "a/b", "a@b", "a:b", "a\n", "é", "٣", "a" * 129, "a\0"]


@pytest.mark.parametrize("name", ["a", "A9", "0", "support-bot_v2.1", "a" * 128])
def test_valid_names_are_accepted(name: str) -> None:
    assert check_name(name) == name
    assert parse_reference(name) == Reference(name, alias="latest", version=None)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_invalid_names_are_rejected(name: str) -> None:
    for check in (check_name, check_alias, parse_reference):
        with pytest.raises(InvalidReference) as refusal:
            check(name if check is not parse_reference or "@" not in name else "@b")
        assert refusal.value.message.isprintable()


@pytest.mark.parametrize("alias", ["latest", "3", "007"])
def test_reserved_and_invalid_aliases_are_rejected(alias: str) -> None:
    with pytest.raises(InvalidReference):
        check_alias(alias)


def test_references_are_parsed() -> None:
    assert parse_reference("a@3") == Reference("a", alias=None, version=3)
    assert parse_reference("a@prod") == Reference("a", alias="prod", version=None)
    assert parse_reference("a@latest") == Reference("a", alias="latest", version=None)
    assert parse_reference("a@v3") == Reference("a", alias="v3", version=None)


@pytest.mark.parametrize("reference", ["@", "a@", "@3", "a@b@c", "a@-1", "a@+3", "a@3 ", "a@٣"])
def test_invalid_references_are_rejected(reference: str) -> None:
    with pytest.raises(InvalidReference):
        parse_reference(reference)


@pytest.mark.parametrize("folder", ["", "a", "abc", "ba", "ab" * 32])
def test_a_blob_key_is_read_only_from_its_own_place(folder: str) -> None:
    key = BlobKey("acme", "ab" * 32)
    assert BlobKey.at(key.place) == key
    assert BlobKey.at(f"acme/{folder}/{key.digest}") is None
