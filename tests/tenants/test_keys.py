"""The format of an API key."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from prefixd.server.tenants import key_text as keys


def test_a_generated_key_parses_to_its_id_and_digest() -> None:
    new = keys.generate()
    assert keys.parse(new.text) == new.parsed
    assert new.text.startswith(f"pfx_{new.parsed.key_id}_")
    assert new.parsed.digest == hashlib.sha256(new.text.encode()).hexdigest()


def test_generated_keys_differ_and_their_repr_hides_the_secret() -> None:
    texts = {keys.generate().text for _ in range(50)}
    assert len(texts) == 50
    new = keys.generate()
    assert new.text not in repr(new)
    assert new.text.split("_")[2] not in repr(new)


@given(position=st.integers(min_value=0, max_value=65), letter=st.sampled_from("09azAZ_é\x00"))
def test_one_wrong_character_fails_the_checksum(position: int, letter: str) -> None:
    text = keys.generate().text
    assert len(text) == 66
    changed = text[:position] + letter + text[position + 1 :]
    if changed != text:
        parsed = keys.parse(changed[:66])
        assert parsed is None


@given(st.text())
def test_any_other_text_parses_to_none(text: str) -> None:
    assert keys.parse(text) is None
    assert keys.parse(f"pfx_{text}") is None
