"""Any bytes are accepted or raise ArtifactRefused, never another exception."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from prefixd.store.artifact.artifact import inspect_peft, pack_peft, read_artifact
from prefixd.store.artifact.envelope import read_envelope
from prefixd.store.artifact.weights import cast
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import (
    BASE,
    HIDDEN,
    P,
    config_bytes,
    config_fields,
    header_entry,
    ramp,
    soft,
    with_header,
)

SOFT = soft()
DATA = ramp(P, HIDDEN).tobytes()

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**60)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "F16", "BF16", "CAUSAL_LM", "prompt_embeddings", "\ud800", "\0"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "F64"]) | values,
        "shape": st.lists(st.integers(-1, 2**63), max_size=4) | st.just([P, HIDDEN]) | values,
        "data_offsets": st.just([0, 256]) | st.lists(st.integers(), max_size=3) | values,
        "more": values,
    },
)
valid = header_entry("F32", [P, HIDDEN], 0)
nearly = entries.map(lambda entry: {k: v for k, v in (valid | entry).items() if k != "more"})
headers = st.fixed_dictionaries(
    {"prompt_embeddings": st.just(valid) | nearly}, optional={"__metadata__": values}
) | st.dictionaries(
    st.sampled_from(["prompt_embeddings", "__metadata__", "prefix_task_cols", "prefix_task_rows"])
    | st.text(max_size=5),
    st.just(valid) | entries | values,
    max_size=4,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "peft_type": st.sampled_from(["PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE"])
        | values,
        "num_virtual_tokens": st.just(P) | values,
        "task_type": st.just("CAUSAL_LM") | values,
        "num_layers": values,
        "token_dim": values,
        "num_transformer_submodules": values,
        "base_model_name_or_path": values,
        "extra": values,
    },
)


def check_message(refusal: ArtifactRefused) -> None:
    event(refusal.code)
    assert refusal.message.isprintable()
    assert refusal.message.replace("…", "").isascii()
    assert len(refusal.message) < 1000


def validate(config: bytes, weights: bytes, task_id: int | None = None) -> None:
    """Validate, and compare an accepted artifact with the stored one."""
    with tempfile.TemporaryDirectory() as directory:
        path, packed = Path(directory, "weights"), Path(directory, "packed")
        path.write_bytes(weights)
        try:
            summary = inspect_peft(config, path, base=BASE, task_id=task_id)
        except ArtifactRefused as refusal:
            check_message(refusal)
            return
        event("accepted")
        pack_peft(config, path, packed, task_id=task_id)
        artifact = read_artifact(packed, base=BASE, count_tokens=len)
        assert artifact.values is not None
        assert artifact.values.shape[0] == summary.num_virtual_tokens


@settings(max_examples=300, deadline=None)
@given(header=headers, data=st.just(DATA) | st.binary(max_size=300), task_id=st.none() | st.just(0))
def test_any_header_is_accepted_or_rejected_with_artifact_refused(
    header: dict[str, Any], data: bytes, task_id: int | None
) -> None:
    validate(config_bytes(), with_header(header, data))
    validate(config_bytes("MULTITASK_PROMPT_TUNING"), with_header(header, data), task_id)


@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, len(SOFT)), cut=st.integers(0, 12), put=st.binary(max_size=12))
def test_any_damage_to_a_valid_file_is_accepted_or_rejected(
    start: int, cut: int, put: bytes
) -> None:
    validate(config_bytes(), SOFT[:start] + put + SOFT[start + cut :])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_accepted_or_rejected(raw: bytes) -> None:
    validate(config_bytes(), raw)
    validate(raw, SOFT)


@settings(max_examples=300, deadline=None)
@given(fields)
def test_any_config_is_accepted_or_rejected(changes: dict[str, Any]) -> None:
    validate(json.dumps(config_fields() | changes).encode(), SOFT)


@settings(max_examples=200, deadline=None)
@given(start=st.integers(0, 400), cut=st.integers(0, 9), put=st.binary(max_size=9))
def test_any_damage_to_an_artifact_is_accepted_or_rejected(
    start: int, cut: int, put: bytes
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        weights, packed = Path(directory, "weights"), Path(directory, "packed")
        weights.write_bytes(SOFT)
        pack_peft(config_bytes(), weights, packed)
        raw = packed.read_bytes()
        packed.write_bytes(raw[:start] + put + raw[start + cut :])
        with contextlib.suppress(ArtifactRefused):
            read_envelope(packed)
        with contextlib.suppress(ArtifactRefused):
            read_artifact(packed, base=BASE, count_tokens=len)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_the_cast_to_bfloat16_and_float16_equals_torch(numbers: list[float]) -> None:
    import torch

    values = np.array(numbers, dtype=np.float32)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        expected = torch.from_numpy(values).to(dtype).to(torch.float32).numpy()
        np.testing.assert_array_equal(cast(values, name), expected)
