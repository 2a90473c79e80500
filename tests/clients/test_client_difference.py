"""Tensors without numpy, and the comparison of two manifests."""

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from prefixd.client.artifacts import Artifact
from prefixd.client.difference import compare
from prefixd.client.errors import ProtocolError
from prefixd.client.tensors import greatest_difference, read_tensors
from prefixd.client.types import Prefix
from tests.clients.samples import MANIFEST
from tests.store.store_artifacts import tensors

ROWS = 300
WIDTH = 700  # more than one chunk


def prefix(**changes: Any) -> Prefix:
    return Prefix.model_validate_json(json.dumps(MANIFEST | changes))


def random(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype("<f4")


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "F16":
        return values.astype("<f2").astype("<f8")
    if dtype == "BF16":
        return (values.view("<u4") & np.uint32(0xFFFF0000)).view("<f4").astype("<f8")
    return values.astype("<f8")


@pytest.mark.parametrize("right", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("left", ["F32", "F16", "BF16"])
def test_greatest_difference_is_that_of_numpy(left: str, right: str):
    ours, theirs = random(1), random(2)
    expected = float(np.abs(rounded(ours, left) - rounded(theirs, right)).max())
    tensor = [
        read_tensors(tensors({"x": values}, dtype))["x"]
        for values, dtype in ((ours, left), (theirs, right))
    ]
    assert greatest_difference(*tensor) == expected
    assert tensor[0].shape == (ROWS, WIDTH)


@pytest.mark.parametrize("position", [0, 65535, 65536, ROWS * WIDTH - 1])
def test_one_value_anywhere_is_seen(position: int):
    values = random(3)
    changed = values.copy()
    changed.reshape(-1)[position] = -9.5
    ours, theirs = (read_tensors(tensors({"x": one}))["x"] for one in (values, changed))
    assert greatest_difference(ours, theirs) == float(values.reshape(-1)[position]) + 9.5
    assert greatest_difference(ours, ours) == 0.0


def test_values_are_decoded_in_bounded_memory():
    payload = tensors({"x": np.zeros((2000, 1000), np.float32)})
    tensor = read_tensors(payload)["x"]
    tracemalloc.start()
    greatest_difference(tensor, tensor)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(payload) / 2


@pytest.mark.parametrize("payload", [b"", bytes(8), b"\x02" + bytes(7) + b"[]", b"x" * 40])
def test_malformed_safetensors_is_refused(payload: bytes):
    with pytest.raises(ProtocolError):
        read_tensors(payload)


def test_a_tensor_of_one_side_has_no_shape_on_the_other():
    ours = Artifact("CPT", None, {}, tensors({"a": random(1)[:2, :3]}))
    theirs = Artifact("CPT", None, {}, tensors({"b": random(1)[:2, :3]}, "BF16"))
    difference = compare(prefix(), prefix(digest="cd" * 32), (ours, theirs))
    assert [(one.name, one.shapes, one.dtypes, one.greatest) for one in difference.tensors] == [
        ("a", ((2, 3), None), ("float32", None), None),
        ("b", (None, (2, 3)), (None, "bfloat16"), None),
    ]


@pytest.mark.parametrize(
    ("left", "right", "fields"),
    [
        ({"n": 1}, {"n": True}, {"metadata.n"}),
        ({"n": 0.0}, {"n": -0.0}, {"metadata.n"}),
        ({"n": None}, {}, {"metadata.n"}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}, set()),
        ({"a": [1, 2]}, {"a": [2, 1]}, {"metadata.a"}),
    ],
)
def test_metadata_is_compared_as_json(
    left: dict[str, object], right: dict[str, object], fields: set[str]
):
    difference = compare(prefix(metadata=left), prefix(metadata=right))
    assert set(difference.fields) == fields
    assert difference.equal == (not fields)


def test_base_counts_by_its_fingerprint():
    names = (prefix(base="tiny", fingerprint="ff"), prefix(base="ffffffffffff", fingerprint="ff"))
    assert compare(*names).equal
    other = compare(names[0], prefix(base="large", fingerprint="ee"))
    assert other.fields == {
        "fingerprint": {"left": "ff", "right": "ee"},
        "base": {"left": "tiny", "right": "large"},
    }


def test_number_and_time_of_a_version_do_not_count():
    later = prefix(name="b", version=9, created_at="2027-01-01T00:00:00+00:00", aliases=[])
    assert compare(prefix(), later).equal
