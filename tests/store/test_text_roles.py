"""The role of a text is part of the artifact: it enters the digest, and stays."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefixd.store.artifact.artifact import inspect_artifact, pack_text, read_artifact
from prefixd.store.artifact.kinds import TextRole
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home


def count(text: str, *, role: TextRole = TextRole.RAW) -> int:
    return len(text) + (100 if role is TextRole.SYSTEM else 0)


def test_a_role_enters_the_digest_and_texts_from_before_keep_theirs(tmp_path: Path) -> None:
    raw = pack_text("Be brief.", tmp_path / "raw")
    system = pack_text("Be brief.", tmp_path / "system", role=TextRole.SYSTEM)
    assert raw.digest != system.digest
    first = (tmp_path / "raw").read_bytes().split(b"\n")[0]
    assert first == (
        b'{"config":null,"format":1,"kind":"hard_prompt","payload_bytes":9,"peft_type":null,'
        b'"task_id":null}'
    )
    base = BASE
    for name, role in (("raw", TextRole.RAW), ("system", TextRole.SYSTEM)):
        artifact = read_artifact(tmp_path / name, base=base, count_tokens=lambda *_, **__: 7)
        assert (artifact.role, artifact.text) == (role, "Be brief.")
    assert inspect_artifact(tmp_path / "raw", base=base, count_tokens=len).num_virtual_tokens == 9


@pytest.mark.parametrize("role", ["raw", "user", 1, None])
def test_another_role_in_a_file_is_refused(tmp_path: Path, role: Any) -> None:
    pack_text("Be brief.", tmp_path / "text", role=TextRole.SYSTEM)
    line, payload = (tmp_path / "text").read_bytes().split(b"\n")
    fields = json.dumps(json.loads(line) | {"role": role}, sort_keys=True, separators=(",", ":"))
    (tmp_path / "text").write_bytes(fields.encode() + b"\n" + payload)
    with pytest.raises(ArtifactRefused) as refused:
        inspect_artifact(tmp_path / "text", base=BASE, count_tokens=count)
    assert refused.value.code == "malformed_artifact"


def test_the_role_is_in_the_manifest_and_no_patch_changes_it(home: Home) -> None:
    for name, role in (("raw", TextRole.RAW), ("system", TextRole.SYSTEM)):
        with home.store.publish_text(
            tenant="acme",
            name=name,
            text="Hi",
            role=role,
            metadata=None,
            base=BASE,
            count_tokens=lambda _, **fields: 2 + len(fields),
        ) as (tx, published):
            assert published.manifest.role is role
            patched = tx.merge_metadata(name, 1, {"role": "raw"}, base=BASE)
            assert (patched.role, patched.metadata) == (role, {"role": "raw"})
            assert patched.num_virtual_tokens == (2 if name == "raw" else 3)
    assert home.put("soft").manifest.role is None
    with home.store.change("acme") as tx:  # as a version from before texts had a role
        tx.connection.exec_driver_sql("UPDATE versions SET role = NULL")
        assert tx.merge_metadata("raw", 1, {}, base=BASE).role is TextRole.RAW
