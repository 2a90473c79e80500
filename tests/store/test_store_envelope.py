"""The artifact file: self-contained, its sha256 the digest, read as strictly as an upload."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from prefixd.store.artifact.artifact import pack_peft, pack_text, read_artifact
from prefixd.store.artifact.config import MAX_CONFIG_BYTES
from prefixd.store.artifact.envelope import read_envelope
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import (
    BASE,
    KV_WIDTH,
    P,
    config_bytes,
    config_fields,
    kv,
    ramp,
    soft,
    spool,
)


def test_a_kv_prefix_survives_a_round_trip(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    packed = pack_peft(config_bytes("CARTRIDGE"), spool(tmp_path, kv()), target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == packed.digest
    assert target.stat().st_size == packed.size_bytes
    artifact = read_artifact(target, base=BASE, count_tokens=len)
    assert (artifact.kind, artifact.peft_type, artifact.text) == ("kv_prefix", "CARTRIDGE", None)
    np.testing.assert_array_equal(artifact.values, ramp(P, KV_WIDTH))


def test_a_text_survives_a_round_trip(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    packed = pack_text("Grüße\n{}", target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == packed.digest
    artifact = read_artifact(target, base=BASE, count_tokens=len)
    assert (artifact.kind, artifact.text, artifact.values) == ("hard_prompt", "Grüße\n{}", None)
    assert (artifact.num_virtual_tokens, artifact.dtype) == (8, None)


def test_the_payload_of_an_artifact_is_the_uploaded_file(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    pack_peft(config_bytes(), spool(tmp_path, soft()), target)
    envelope = read_envelope(target)
    assert target.read_bytes()[envelope.payload_offset :] == soft()
    assert envelope.payload_bytes == len(soft())
    assert envelope.config == config_fields()


def test_whitespace_in_the_config_does_not_change_the_digest_but_content_does(
    tmp_path: Path,
) -> None:
    weights, target = spool(tmp_path, soft()), tmp_path / "artifact"
    spaced = json.dumps(dict(reversed(config_fields().items())), indent=4).encode()
    digests = [
        pack_peft(config, weights, target).digest
        for config in (config_bytes(), spaced, config_bytes("CPT"), config_bytes(revision="x"))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    "filler",
    ['"é"', "1e15", '"\N{GRINNING FACE}"', "[[[[[[[[[[[[[[0]]]]]]]]]]]]]]", "-0.0", "9" * 4000],
)
def test_every_accepted_config_can_be_read_back(tmp_path: Path, filler: str) -> None:
    config = config_bytes()[:-1] + b',"x":['
    room = MAX_CONFIG_BYTES - len(config) - 2
    count = room // (len(filler.encode()) + 1)
    config += ",".join([filler] * count).encode() + b"]}"
    assert MAX_CONFIG_BYTES - 5000 < len(config) <= MAX_CONFIG_BYTES
    target = tmp_path / "artifact"
    pack_peft(config, spool(tmp_path, soft()), target)
    assert read_artifact(target, base=BASE, count_tokens=len).num_virtual_tokens == P


FIELDS = {
    "config": None,
    "format": 1,
    "kind": "hard_prompt",
    "payload_bytes": 2,
    "peft_type": None,
    "task_id": None,
}


def line(**changes: object) -> bytes:
    return json.dumps(FIELDS | changes, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"{}\nhi",
        line()[:-1],
        line() + b"hi!",
        b" " + line() + b"hi",
        line(format=2) + b"hi",
        line(format=True) + b"hi",
        line(payload_bytes=2.0) + b"hi",
        line(payload_bytes=True) + b"h",
        line(task_id="0") + b"hi",
        line(kind="soft_prompt") + b"hi",
        line(peft_type="CPT") + b"hi",
        line(config={"peft_type": ["CPT"]}) + b"hi",
        line(config=[]) + b"hi",
        line(config=config_fields(), peft_type="CPT", kind="soft_prompt") + b"hi",
        line(config=config_fields("CARTRIDGE"), peft_type="CARTRIDGE", kind="soft_prompt") + b"hi",
        line(more=1) + b"hi",
    ],
)
def test_a_malformed_envelope_is_rejected(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(line() + b"hi")
    assert read_envelope(path).kind == "hard_prompt"
    path.write_bytes(raw)
    with pytest.raises(ArtifactRefused) as refusal:
        read_envelope(path)
    assert refusal.value.code == "malformed_artifact"


def test_a_stored_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.write_bytes(line() + b"\xff\xff")
    with pytest.raises(ArtifactRefused) as refusal:
        read_artifact(path, base=BASE, count_tokens=len)
    assert refusal.value.code == "malformed_text"
