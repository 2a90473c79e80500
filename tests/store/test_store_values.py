"""Values read in pieces of any size equal those of the file."""

from pathlib import Path

import numpy as np
import pytest

from prefixd.store.artifact import weights as weight_pieces
from prefixd.store.artifact.artifact import pack_peft, read_artifact
from prefixd.store.artifact.weights import ValueRule, check_range
from prefixd.store.errors import ArtifactRefused
from tests.store.store_artifacts import BASE, HIDDEN, P, config_bytes, multitask, ramp, soft, spool


def read(tmp_path: Path, config: bytes, weights: bytes, task_id: int | None) -> np.ndarray | None:
    target = tmp_path / "artifact"
    pack_peft(config, spool(tmp_path, weights), target, task_id=task_id)
    return read_artifact(target, base=BASE, count_tokens=len).values


@pytest.mark.parametrize("chunk", [1, HIDDEN, 3 * HIDDEN, 2**20])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_soft_prompt_read_in_pieces_equals_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: str
) -> None:
    monkeypatch.setattr(weight_pieces, "CHUNK_ELEMENTS", chunk)
    found = read(tmp_path, config_bytes(), soft(dtype=dtype), None)
    np.testing.assert_array_equal(found, ramp(P, HIDDEN))  # exact in all three


@pytest.mark.parametrize("chunk", [1, 3 * HIDDEN, 2**20])
@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_multitask_product_read_in_pieces_equals_the_full_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, task: int
) -> None:
    monkeypatch.setattr(weight_pieces, "CHUNK_ELEMENTS", chunk)
    found = read(tmp_path, config_bytes("MULTITASK_PROMPT_TUNING"), multitask(), task)
    product = ramp(3, P, 2)[task] @ ramp(3, 2, HIDDEN)[task]
    assert found is not None
    np.testing.assert_allclose(found, ramp(P, HIDDEN) * product, rtol=1e-6)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_non_finite_product_is_detected_before_the_cast(dtype: str, bits: int) -> None:
    """0x7fffffff rounds up to -0 as bfloat16 when NaN is not handled."""
    product = np.array([[0, bits]], dtype=np.uint32).view(np.float32)
    with pytest.raises(ArtifactRefused, match="row 7, column 1"):
        check_range(product, ValueRule(dtype, 3e38), first_row=7, name="x")
